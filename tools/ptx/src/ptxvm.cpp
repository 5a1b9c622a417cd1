// An independent interpreter of the PTX that nvcc makes, for checking kernels without a GPU: see README.md.
// Written from the PTX ISA; shares nothing with the project's own emulator.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#pragma STDC FENV_ACCESS ON

struct PtxDim3 { unsigned x, y, z; };
using std::string;
using std::vector;
namespace {

[[noreturn]] void fatal(const string& s) {
    fprintf(stderr, "ptxvm: %s\n", s.c_str());
    abort();
}

// ---------------------------------------------------------------- program
enum Op {
    MOV32, MOV64, MOVPACK, ADD32, SUB32, MULLO32, MADLO32, ADD64, MULLO64, MULWIDES, MULWIDEU, MULWIDEU16, SHL32, SHL64,
    SHRU32, SHRS32, SHRU64, SHRS64, AND, OR, XOR, NOTP, AND64, OR64, DIVS, REMS, MAXS, BFI, SELP32, SELP64,
    SETP_S32, SETP_U32, SETP_F32, SETP_S64, SUB16, MULLO16, SHR16,
    FADD, FMUL, FMA, FMARM, FDIV, FNEG, EX2, CVTSAT,
    CVT_S64_S32, CVT_U64_U32, CVT_U32_U64, CVT_U16_U32, CVT_U32_U16, CVT_F16_F32, CVT_BF16_F32, CVT_F32_F16,
    LDPARAM, LDGLOBAL, LDGLOBALNC, STGLOBAL, LDSHARED, STSHARED, CVTAGLOBAL,
    CPASYNC, CPCOMMIT, CPWAIT, FENCEPROXY, BARSYNC, BARWARP, SHFL, LDMATRIX, LDMATRIXT, MMA_F16, MMA_BF16,
    WGMMA_F16, WGMMA_BF16, WGFENCE, WGCOMMIT, WGWAIT, BRA, RET, NOP
};
enum Cmp { EQ, NE, LT, LE, GT, GE };

struct Ins {
    Op op;
    int guard = -1;
    bool gneg = false;
    int d = -1, a = -1, b = -1, c = -1, e = -1;  // register numbers in the file that the op says
    int64_t imm = 0;
    Cmp cmp = EQ;
    int target = -1;
    int width = 0, count = 1;       // memory: bytes of an element, elements
    bool is64 = false, sx = false;  // loads into 64-bit registers; sign extended
    bool addr64 = true, symbol = false;
    vector<int> regs;      // memory data, fragments
    vector<int> rd, wr;    // 32-bit registers read and written, for wgmma's rules
    string text;
};

struct Kernel {
    string name, target;
    vector<Ins> code;
    int n32 = 0, n64 = 0;
    vector<std::pair<int, uint32_t>> const32;
    vector<std::pair<int, uint64_t>> const64;
    int param_bytes = 0, maxntid = 0;
    bool has_wgmma = false;
    mutable vector<uint64_t> hits;
};
std::map<string, Kernel> kernels;  // by "sm_80:name"

constexpr uint64_t PARAM_BASE = 0xAAAA000000000000ull;

struct Parser {
    Kernel& k;
    string shared_symbol;
    vector<std::map<string, string>> scopes;
    std::map<string, std::pair<char, int>> regs;  // name -> (file '3'/'6', number)
    std::map<string, int> labels;
    vector<std::pair<int, string>> fixups;
    int unique = 0;
    std::map<uint32_t, int> c32;
    std::map<uint64_t, int> c64;

    static string trim(const string& s) {
        size_t a = s.find_first_not_of(" \t\n\r"), b = s.find_last_not_of(" \t\n\r");
        return a == string::npos ? "" : s.substr(a, b - a + 1);
    }
    string resolve(const string& n) {
        for (size_t i = scopes.size(); i-- > 0;) {
            auto it = scopes[i].find(n);
            if (it != scopes[i].end()) return it->second;
        }
        return n;
    }
    void declare(const string& name, const string& type) {
        const bool wide = type == ".b64" || type == ".u64" || type == ".s64" || type == ".f64";
        if (!wide && type != ".pred" && type != ".b16" && type != ".b32" && type != ".f32") fatal("reg type " + type);
        regs[name] = wide ? std::make_pair('6', k.n64++) : std::make_pair('3', k.n32++);
    }
    void reg_statement(const string& s) {  // .reg .type name<N> | name, name
        std::istringstream in(s);
        string reg, type, rest;
        in >> reg >> type;
        std::getline(in, rest);
        rest = trim(rest);
        size_t lt = rest.find('<');
        if (lt != string::npos) {
            const int n = atoi(rest.c_str() + lt + 1);
            const string base = rest.substr(0, lt);
            for (int i = 0; i < n; ++i) declare(base + std::to_string(i), type);
        } else {
            std::istringstream list(rest);
            string one;
            while (std::getline(list, one, ',')) {
                one = trim(one);
                const string name = scopes.size() > 1 ? one + "@" + std::to_string(unique++) : one;
                scopes.back()[one] = name;
                declare(name, type);
            }
        }
    }
    // operands
    int const_32(uint32_t v) {
        auto it = c32.find(v);
        if (it != c32.end()) return it->second;
        k.const32.push_back({k.n32, v});
        return c32[v] = k.n32++;
    }
    int const_64(uint64_t v) {
        auto it = c64.find(v);
        if (it != c64.end()) return it->second;
        k.const64.push_back({k.n64, v});
        return c64[v] = k.n64++;
    }
    static bool is_imm(const string& s) {
        return !s.empty() && (isdigit(s[0]) || s[0] == '-');
    }
    static int64_t parse_imm(const string& s) {
        if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F'))
            return static_cast<int64_t>(strtoull(s.c_str() + 2, nullptr, 16));
        if (s[0] == '-') return strtoll(s.c_str(), nullptr, 0);
        return static_cast<int64_t>(strtoull(s.c_str(), nullptr, 0));
    }
    int r32(const string& raw) {
        const string s = trim(raw);
        if (is_imm(s)) return const_32(static_cast<uint32_t>(parse_imm(s)));
        if (s == "%tid.x" || s == "%ctaid.x") {
            if (!regs.count(s)) declare(s, ".b32");
            return regs[s].second;
        }
        if (s == shared_symbol) {
            if (!regs.count("@shared")) declare("@shared", ".b32");
            return regs["@shared"].second;
        }
        auto it = regs.find(resolve(s));
        if (it == regs.end() || it->second.first != '3') fatal("32-bit operand '" + s + "' in " + k.name);
        return it->second.second;
    }
    int r64(const string& raw) {
        const string s = trim(raw);
        if (is_imm(s)) return const_64(static_cast<uint64_t>(parse_imm(s)));
        if (s == k.name + "_param_0") return const_64(PARAM_BASE);
        auto it = regs.find(resolve(s));
        if (it == regs.end() || it->second.first != '6') fatal("64-bit operand '" + s + "' in " + k.name);
        return it->second.second;
    }
    static vector<string> split(const string& s) {
        vector<string> out;
        int depth = 0;
        string now;
        for (char ch : s) {
            if (ch == '{' || ch == '[') ++depth;
            if (ch == '}' || ch == ']') --depth;
            if (ch == ',' && depth == 0) {
                out.push_back(trim(now));
                now.clear();
            } else
                now += ch;
        }
        if (!trim(now).empty()) out.push_back(trim(now));
        return out;
    }
    static vector<string> list(const string& s) {  // "{a, b}" or "a"
        const string t = trim(s);
        if (t.empty() || t[0] != '{') return {t};
        return split(t.substr(1, t.size() - 2));
    }
    void address(Ins& i, const string& s, bool wide) {  // "[reg+N]"
        string t = trim(s);
        if (t[0] != '[') fatal("address " + s);
        t = trim(t.substr(1, t.size() - 2));
        size_t plus = t.find('+');
        i.imm = 0;
        string base = t;
        if (plus != string::npos) {
            i.imm = parse_imm(trim(t.substr(plus + 1)));
            base = trim(t.substr(0, plus));
        }
        i.addr64 = wide;
        i.a = wide ? r64(base) : r32(base);
    }
    static bool starts(const string& s, const char* p) { return s.rfind(p, 0) == 0; }

    void statement(const string& raw) {
        string s = trim(raw);
        if (s.empty()) return;
        if (starts(s, ".reg")) return reg_statement(s);
        if (starts(s, ".pragma")) return;
        if (s[0] == '.') fatal("directive " + s);
        Ins i;
        i.text = s.size() > 160 ? s.substr(0, 160) : s;
        if (s[0] == '@') {
            size_t sp = s.find_first_of(" \t");
            string g = s.substr(1, sp - 1);
            if (g[0] == '!') i.gneg = true, g = g.substr(1);
            i.guard = r32(g);
            s = trim(s.substr(sp));
        }
        size_t sp = s.find_first_of(" \t");
        const string op = sp == string::npos ? s : s.substr(0, sp);
        const vector<string> o = sp == string::npos ? vector<string>{} : split(s.substr(sp));
        decode(i, op, o);
        k.code.push_back(i);
    }
    void abc32(Ins& i, const vector<string>& o) {
        i.d = r32(o[0]);
        i.a = r32(o[1]);
        if (o.size() > 2) i.b = r32(o[2]);
        if (o.size() > 3) i.c = r32(o[3]);
        i.wr = {i.d};
        for (int r : {i.a, i.b, i.c})
            if (r >= 0) i.rd.push_back(r);
    }
    void ab64(Ins& i, const vector<string>& o) {
        i.d = r64(o[0]), i.a = r64(o[1]);
        if (o.size() > 2) i.b = r64(o[2]);
    }
    void decode(Ins& i, const string& op, const vector<string>& o) {
        static const std::map<string, Op> simple32 = {
            {"mov.f32", MOV32}, {"mov.u32", MOV32}, {"add.s32", ADD32}, {"sub.s32", SUB32}, {"mul.lo.s32", MULLO32},
            {"mad.lo.s32", MADLO32}, {"shl.b32", SHL32}, {"shr.u32", SHRU32}, {"shr.s32", SHRS32}, {"and.b32", AND},
            {"or.b32", OR}, {"xor.b32", XOR}, {"and.pred", AND}, {"or.pred", OR}, {"not.pred", NOTP}, {"and.b16", AND},
            {"div.s32", DIVS}, {"rem.s32", REMS}, {"max.s32", MAXS}, {"add.f32", FADD}, {"mul.f32", FMUL},
            {"fma.rn.f32", FMA}, {"fma.rm.f32", FMARM}, {"div.rn.f32", FDIV}, {"neg.f32", FNEG},
            {"ex2.approx.ftz.f32", EX2}, {"cvt.sat.f32.f32", CVTSAT}, {"selp.f32", SELP32}, {"selp.b32", SELP32},
            {"selp.u32", SELP32}, {"selp.u16", SELP32}, {"sub.s16", SUB16}, {"mul.lo.s16", MULLO16}, {"shr.u16", SHR16},
            {"mul.wide.u16", MULWIDEU16}, {"cvt.u16.u32", CVT_U16_U32}, {"cvt.u32.u16", CVT_U32_U16},
            {"cvt.rn.f16.f32", CVT_F16_F32}, {"cvt.rn.bf16.f32", CVT_BF16_F32}, {"cvt.f32.f16", CVT_F32_F16}};
        static const std::map<string, Op> simple64 = {
            {"mov.u64", MOV64}, {"add.s64", ADD64}, {"mul.lo.s64", MULLO64}, {"and.b64", AND64}, {"or.b64", OR64},
            {"cvta.to.global.u64", CVTAGLOBAL}};
        auto it = simple32.find(op);
        if (it != simple32.end()) {
            i.op = it->second;
            return abc32(i, o);
        }
        it = simple64.find(op);
        if (it != simple64.end()) {
            i.op = it->second;
            return ab64(i, o);
        }
        if (op == "mov.b32") {
            if (trim(o[1])[0] == '{') {
                const auto parts = list(o[1]);
                i.op = MOVPACK, i.d = r32(o[0]), i.a = r32(parts[0]), i.b = r32(parts[1]);
                i.wr = {i.d}, i.rd = {i.a, i.b};
                return;
            }
            if (trim(o[0])[0] == '{') fatal("unpack");
            i.op = MOV32;
            return abc32(i, o);
        }
        if (op == "mov.b64") {
            i.op = MOV64;
            return ab64(i, o);
        }
        if (op == "bfi.b32") {
            i.op = BFI;
            i.d = r32(o[0]), i.a = r32(o[1]), i.b = r32(o[2]), i.c = r32(o[3]), i.e = r32(o[4]);
            i.wr = {i.d};
            return;
        }
        if (op == "selp.b64") {
            i.op = SELP64, i.d = r64(o[0]), i.a = r64(o[1]), i.b = r64(o[2]), i.c = r32(o[3]);
            return;
        }
        if (op == "shl.b64" || op == "shr.s64" || op == "shr.u64") {
            i.op = op == "shl.b64" ? SHL64 : op == "shr.s64" ? SHRS64 : SHRU64;
            i.d = r64(o[0]), i.a = r64(o[1]), i.b = r32(o[2]);
            return;
        }
        if (op == "mul.wide.s32" || op == "mul.wide.u32") {
            i.op = op == "mul.wide.s32" ? MULWIDES : MULWIDEU;
            i.d = r64(o[0]), i.a = r32(o[1]), i.b = r32(o[2]);
            return;
        }
        if (op == "cvt.s64.s32" || op == "cvt.u64.u32") {
            i.op = op == "cvt.s64.s32" ? CVT_S64_S32 : CVT_U64_U32;
            i.d = r64(o[0]), i.a = r32(o[1]);
            return;
        }
        if (op == "cvt.u32.u64") {
            i.op = CVT_U32_U64, i.d = r32(o[0]), i.a = r64(o[1]);
            i.wr = {i.d};
            return;
        }
        if (starts(op, "setp.")) {
            const string cmp = op.substr(5, 2), type = op.substr(8);
            static const std::map<string, Cmp> cmps = {{"eq", EQ}, {"ne", NE}, {"lt", LT}, {"le", LE}, {"gt", GT}, {"ge", GE}};
            i.cmp = cmps.at(cmp);
            if (type == "s64") {
                i.op = SETP_S64, i.d = r32(o[0]), i.a = r64(o[1]), i.b = r64(o[2]);
                return;
            }
            i.op = type == "s32" ? SETP_S32 : type == "u32" || type == "b32" ? SETP_U32 : type == "f32" ? SETP_F32 : NOP;
            if (i.op == NOP) fatal(op);
            return abc32(i, o);
        }
        if (starts(op, "ld.") || starts(op, "st.")) return memory(i, op, o);
        if (op == "cp.async.cg.shared.global" || op == "cp.async.ca.shared.global") {
            i.op = CPASYNC;
            i.width = static_cast<int>(parse_imm(o[2]));
            string d = trim(o[0]), s = trim(o[1]);
            address(i, d, false);
            i.b = r64(s.substr(1, s.size() - 2));
            i.c = o.size() > 3 ? r32(o[3]) : -1;
            if (op.find(".cg.") != string::npos && i.width != 16) fatal("cp.async.cg of " + o[2]);
            return;
        }
        if (op == "cp.async.commit_group") { i.op = CPCOMMIT; return; }
        if (op == "cp.async.wait_group") { i.op = CPWAIT, i.imm = parse_imm(o[0]); return; }
        if (op == "fence.proxy.async.shared::cta") { i.op = FENCEPROXY; return; }
        if (op == "bar.sync") { i.op = BARSYNC, i.imm = parse_imm(o[0]); if (o.size() > 1) fatal("bar.sync count"); return; }
        if (op == "bar.warp.sync") { i.op = BARWARP, i.a = r32(o[0]); return; }
        if (op == "shfl.sync.bfly.b32") {
            i.op = SHFL;
            const size_t bar = o[0].find('|');
            i.d = r32(o[0].substr(0, bar));
            if (bar != string::npos) i.regs = {r32(o[0].substr(bar + 1))};
            i.a = r32(o[1]), i.b = r32(o[2]), i.c = r32(o[3]), i.e = r32(o[4]);
            return;
        }
        if (starts(op, "ldmatrix.sync.aligned.m8n8.x4")) {
            i.op = op == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" ? LDMATRIXT
                   : op == "ldmatrix.sync.aligned.m8n8.x4.shared.b16"     ? LDMATRIX
                                                                           : NOP;
            if (i.op == NOP) fatal(op);
            for (auto& x : list(o[0])) i.regs.push_back(r32(x));
            address(i, o[1], false);
            return;
        }
        if (starts(op, "mma.sync")) {
            i.op = op == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"     ? MMA_F16
                   : op == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" ? MMA_BF16
                                                                                  : NOP;
            if (i.op == NOP) fatal(op);
            for (int n = 0; n < 4; ++n)
                for (auto& x : list(o[n])) i.regs.push_back(r32(x));
            if (i.regs.size() != 14) fatal("mma operands");
            return;
        }
        if (starts(op, "wgmma.mma_async")) {
            i.op = op == "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"     ? WGMMA_F16
                   : op == "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" ? WGMMA_BF16
                                                                                    : NOP;
            if (i.op == NOP) fatal(op);
            for (auto& x : list(o[0])) i.regs.push_back(r32(x));
            if (i.regs.size() != 64 || o.size() != 8) fatal("wgmma operands");
            i.a = r64(o[1]), i.b = r64(o[2]), i.c = r32(o[3]);
            // scale-a, scale-b, trans-a, trans-b
            if (parse_imm(o[4]) != 1 || parse_imm(o[5]) != 1) fatal("wgmma scale");
            i.imm = parse_imm(o[6]) | parse_imm(o[7]) << 1;
            k.has_wgmma = true;
            return;
        }
        if (op == "wgmma.fence.sync.aligned") { i.op = WGFENCE; return; }
        if (op == "wgmma.commit_group.sync.aligned") { i.op = WGCOMMIT; return; }
        if (op == "wgmma.wait_group.sync.aligned") { i.op = WGWAIT, i.imm = parse_imm(o[0]); return; }
        if (op == "bra" || op == "bra.uni") {
            i.op = BRA;
            fixups.push_back({static_cast<int>(k.code.size()), trim(o[0])});
            return;
        }
        if (op == "ret") { i.op = RET; return; }
        fatal("unknown instruction " + op + " in " + k.name);
    }
    void memory(Ins& i, const string& op, const vector<string>& o) {
        vector<string> p;
        std::istringstream in(op);
        string x;
        while (std::getline(in, x, '.')) p.push_back(x);
        const bool load = p[0] == "ld";
        size_t n = 2;
        bool nc = false;
        if (p[n] == "nc") nc = true, ++n;
        if (p[n] == "v2") i.count = 2, ++n;
        else if (p[n] == "v4") i.count = 4, ++n;
        const string type = p[n];
        if (n + 1 != p.size()) fatal(op);
        i.width = atoi(type.c_str() + 1) / 8;
        i.sx = type[0] == 's';
        const string& space = p[1];
        i.op = space == "param" ? LDPARAM
               : space == "global" ? (load ? (nc ? LDGLOBALNC : LDGLOBAL) : STGLOBAL)
               : space == "shared" ? (load ? LDSHARED : STSHARED)
                                   : NOP;
        if (i.op == NOP) fatal(op);
        for (auto& r : list(load ? o[0] : o[1])) {
            const string name = trim(r);
            if (!is_imm(name) && regs.count(resolve(name)) && regs[resolve(name)].first == '6') {
                i.is64 = true;
                i.regs.push_back(r64(name));
            } else {
                i.regs.push_back(r32(name));
                (load ? i.wr : i.rd).push_back(i.regs.back());
            }
        }
        if (static_cast<int>(i.regs.size()) != i.count) fatal("count " + op);
        address(i, load ? o[1] : o[0], space != "shared");
    }
    void body(const string& t) {
        scopes.push_back({});
        size_t p = 0;
        while (p < t.size()) {
            while (p < t.size() && isspace(static_cast<unsigned char>(t[p]))) ++p;
            if (p >= t.size()) break;
            if (t[p] == '{') {
                scopes.push_back({});
                ++p;
                continue;
            }
            if (t[p] == '}') {
                scopes.pop_back();
                ++p;
                continue;
            }
            // label?
            size_t q = p;
            while (q < t.size() && (isalnum(static_cast<unsigned char>(t[q])) || t[q] == '_' || t[q] == '$')) ++q;
            if (q > p && q < t.size() && t[q] == ':') {
                labels[t.substr(p, q - p)] = static_cast<int>(k.code.size());
                p = q + 1;
                continue;
            }
            size_t semi = t.find(';', p);
            if (semi == string::npos) fatal("no ; in " + k.name);
            statement(t.substr(p, semi - p));
            p = semi + 1;
        }
        for (auto& f : fixups) {
            if (!labels.count(f.second)) fatal("label " + f.second);
            k.code[f.first].target = labels[f.second];
        }
    }
};

void load_file(const string& path) {
    std::ifstream in(path);
    if (!in) fatal("cannot read " + path);
    string text, line, target, shared;
    while (std::getline(in, line)) {
        size_t c = line.find("//");
        if (c != string::npos) line = line.substr(0, c);
        const string first = Parser::trim(line);
        if (Parser::starts(first, ".loc") || Parser::starts(first, ".file")) continue;
        if (Parser::starts(first, ".section")) break;
        text += line + "\n";
    }
    size_t t = text.find(".target");
    target = Parser::trim(text.substr(t + 7, text.find('\n', t) - t - 7));
    size_t s = text.find(".extern .shared");
    if (s != string::npos) {
        size_t b = text.find(".b8", s) + 3, e = text.find('[', b);
        shared = Parser::trim(text.substr(b, e - b));
    }
    size_t p = 0;
    while ((p = text.find(".entry", p)) != string::npos) {
        size_t open = text.find('(', p), close = text.find(')', open);
        Kernel k;
        k.name = Parser::trim(text.substr(p + 6, open - p - 6));
        k.target = target;
        const string params = text.substr(open, close - open);
        k.param_bytes = atoi(params.c_str() + params.rfind('[') + 1);
        size_t brace = text.find('{', close);
        const string head = text.substr(close, brace - close);
        size_t m = head.find(".maxntid");
        if (m != string::npos) k.maxntid = atoi(head.c_str() + m + 8);
        int depth = 0;
        size_t q = brace;
        for (; q < text.size(); ++q) {
            if (text[q] == '{') ++depth;
            if (text[q] == '}' && --depth == 0) break;
        }
        Parser parser{k, shared, {}, {}, {}, {}, 0, {}, {}};
        parser.declare("%tid.x", ".b32");
        parser.declare("%ctaid.x", ".b32");
        parser.declare("@shared", ".b32");
        parser.body(text.substr(brace + 1, q - brace - 1));
        k.hits.assign(k.code.size(), 0);
        const string key = target + ":" + k.name;
        kernels[key] = std::move(k);
        p = q;
    }
}

// ---------------------------------------------------------------- state
float half_table[65536], bf_table[65536];
struct InitTables {
    InitTables() {
        for (int i = 0; i < 65536; ++i) {
            half_table[i] = _cvtsh_ss(static_cast<unsigned short>(i));
            uint32_t w = static_cast<uint32_t>(i) << 16;
            memcpy(&bf_table[i], &w, 4);
        }
    }
} init_tables;

float asf(uint32_t w) {
    float f;
    memcpy(&f, &w, 4);
    return f;
}
uint32_t asw(float f) {
    uint32_t w;
    memcpy(&w, &f, 4);
    return w;
}

struct Region {
    uintptr_t lo, hi;
    int flags;  // 1 read, 2 write, 4: every read has to come before the write (residual in place)
    string name;
    vector<uint8_t> written;  // per byte
    uint64_t reads = 0, writes = 0;
};
vector<Region> regions;
vector<string> errors;
uint64_t error_count = 0;
std::map<string, uint64_t> stats;

struct Options {
    int order = 0;      // warps: 0 forward, 1 reverse, 2 random slices
    int async_mode = 0; // cp.async lands 0 at wait, 1 at issue, 2 either
    int wg_mode = 0;    // wgmma happens 0 at wait, 1 at issue, 2 either
    int lanes = 0;      // diverged lanes: 0 lowest pc first, 1 random
    uint32_t seed = 1;
    uint32_t shared_base = 1024;
    int block_order = 0;
    int limit = 232448;
    string target = "sm_90a";
} options;

struct Rng {
    uint64_t s = 88172645463325252ull;
    uint32_t next() {
        s ^= s << 13, s ^= s >> 7, s ^= s << 17;
        return static_cast<uint32_t>(s >> 16);
    }
    uint32_t below(uint32_t n) { return n ? next() % n : 0; }
} rng;

struct Sh {
    int32_t wt = -1;
    uint32_t we = 0, wws = 0, wf = 0;
    int32_t rt = -1;
    uint32_t re = 0xffffffff;
    int64_t rws = 0;
    int32_t rwarp = -1;
    int32_t fly = -1;
    int32_t wgread = 0;
    bool init = false;
};

struct Copy {
    uint32_t dst;
    const uint8_t* src;
    int width, src_bytes;
    uint32_t group;
    bool landed;  // data written already
};
struct WgOp {
    int pc;
    uint64_t a, b;
    bool scale_d, done;
    uint32_t group;
    vector<std::pair<uint32_t, uint32_t>> ranges;  // 16-byte pieces read: (offset in shared / 16, count)
};
struct Frag {
    int pc;
    uint32_t mask;
    int st;
};
struct Warp {
    int id;
    vector<uint32_t> r32;
    vector<uint64_t> r64;
    vector<Frag> frags;
    uint32_t exited = 0;
    uint32_t epoch = 0, wsync = 0;
    vector<Copy> copies[32];
    uint32_t groups[32];
    vector<uint32_t> fences[32];  // epoch of each proxy fence
    vector<WgOp> wg;
    uint32_t wg_group = 0;
    vector<int> inflight;      // per 32-bit register
    int inflight_total = 0;
    vector<uint64_t> seq;      // last write by anything but wgmma
    uint64_t now = 1, fence_now = 0;
    vector<uint64_t> wg_trace;
    bool at_barrier = false;
};

struct Block {
    const Kernel& k;
    const uint8_t* params;
    int number, threads, warps;
    vector<uint8_t> mem;
    vector<Sh> sh;
    vector<Warp> w;
    uint64_t instructions = 0;

    Block(const Kernel& kk, const uint8_t* p, int n, int t, size_t bytes) : k(kk), params(p), number(n), threads(t) {
        warps = t / 32;
        mem.assign(bytes, 0xff);
        sh.assign((bytes + 3) / 4, Sh{});
        w.resize(warps);
        for (int i = 0; i < warps; ++i) {
            Warp& x = w[i];
            x.id = i;
            x.r32.assign(static_cast<size_t>(k.n32) * 32, 0xCDCDCDCDu);
            x.r64.assign(static_cast<size_t>(k.n64) * 32, 0xCDCDCDCDCDCDCDCDull);
            for (auto& c : k.const32)
                for (int l = 0; l < 32; ++l) x.r32[c.first * 32 + l] = c.second;
            for (auto& c : k.const64)
                for (int l = 0; l < 32; ++l) x.r64[c.first * 32 + l] = c.second;
            for (int l = 0; l < 32; ++l) {
                x.r32[0 * 32 + l] = i * 32 + l;
                x.r32[1 * 32 + l] = n;
                x.r32[2 * 32 + l] = options.shared_base;
                x.groups[l] = 0;
            }
            x.frags = {{0, 0xffffffffu, 0}};
            if (k.has_wgmma) x.inflight.assign(k.n32, 0), x.seq.assign(k.n32, 0);
        }
    }

    void error(const char* kind, const Warp& x, int lane, const Ins& i, const string& more) {
        ++error_count;
        ++stats[string("error: ") + kind];
        if (errors.size() < 200)
            errors.push_back(string(kind) + " | block " + std::to_string(number) + " warp " + std::to_string(x.id) +
                             " lane " + std::to_string(lane) + " epoch " + std::to_string(x.epoch) + " | " + i.text +
                             " | " + more + " | " + k.target + " " + k.name);
    }

    // ------------------------------------------------ shared memory
    bool shared_range(Warp& x, int lane, const Ins& i, uint32_t addr, int bytes, uint32_t& off) {
        off = addr - options.shared_base;
        if (addr < options.shared_base || static_cast<uint64_t>(off) + bytes > mem.size()) {
            error("shared out of bounds", x, lane, i, "offset " + std::to_string(static_cast<int32_t>(off)) + " of " + std::to_string(mem.size()));
            return false;
        }
        if (addr % bytes) {
            error("shared misaligned", x, lane, i, "offset " + std::to_string(off) + " bytes " + std::to_string(bytes));
            return false;
        }
        return true;
    }
    void note_read(Warp& x, int lane, const Ins& i, uint32_t off, int bytes) {
        const int t = x.id * 32 + lane;
        for (uint32_t q = off / 4; q < (off + bytes + 3) / 4; ++q) {
            Sh& s = sh[q];
            if (s.fly >= 0) error("read under cp.async", x, lane, i, "offset " + std::to_string(q * 4) + " copied by thread " + std::to_string(s.fly));
            if (!s.init) {
                ++stats["uninitialised shared words read"];
                error("uninitialised shared read", x, lane, i, "offset " + std::to_string(q * 4));
            }
            if (s.wt >= 0 && s.wt != t && s.we == x.epoch && !(s.wt / 32 == x.id && s.wws < x.wsync))
                error("race: read after write", x, lane, i, "offset " + std::to_string(q * 4) + " written by thread " + std::to_string(s.wt));
            if (s.re != x.epoch) s.rt = t, s.re = x.epoch, s.rws = x.wsync, s.rwarp = x.id;
            else {
                if (s.rt != t) s.rt = -2;
                if (s.rwarp != x.id) s.rwarp = -2;
                s.rws = std::max<int64_t>(s.rws, x.wsync);
            }
        }
    }
    void check_write(Warp& x, int lane, const Ins& i, uint32_t off, int bytes) {
        const int t = x.id * 32 + lane;
        for (uint32_t q = off / 4; q < (off + bytes + 3) / 4; ++q) {
            Sh& s = sh[q];
            if (s.fly >= 0) error("write under cp.async", x, lane, i, "offset " + std::to_string(q * 4) + " copied by thread " + std::to_string(s.fly));
            if (s.wgread > 0) error("write under wgmma", x, lane, i, "offset " + std::to_string(q * 4));
            if (s.wt >= 0 && s.wt != t && s.we == x.epoch && !(s.wt / 32 == x.id && s.wws < x.wsync))
                error("race: write after write", x, lane, i, "offset " + std::to_string(q * 4) + " written by thread " + std::to_string(s.wt));
            if (s.re == x.epoch && s.rt != t && !(s.rwarp == x.id && s.rws < static_cast<int64_t>(x.wsync)))
                error("race: write after read", x, lane, i, "offset " + std::to_string(q * 4) + " read by thread " + std::to_string(s.rt));
        }
    }
    void set_written(Warp& x, int lane, uint32_t off, int bytes) {
        for (uint32_t q = off / 4; q < (off + bytes + 3) / 4; ++q) {
            Sh& s = sh[q];
            s.wt = x.id * 32 + lane, s.we = x.epoch, s.wws = x.wsync;
            s.wf = static_cast<uint32_t>(x.fences[lane].size());
            s.init = true;
        }
    }
    // ------------------------------------------------ global memory
    Region* find(uintptr_t p, int bytes) {
        for (auto& r : regions)
            if (p >= r.lo && p + bytes <= r.hi) return &r;
        return nullptr;
    }
    Region* global_range(Warp& x, int lane, const Ins& i, uintptr_t p, int bytes, bool write) {
        Region* r = find(p, bytes);
        if (!r) {
            string near;
            for (auto& q : regions)
                if (p + 65536 > q.lo && p < q.hi + 65536)
                    near += " " + q.name + "[" + std::to_string(static_cast<int64_t>(p - q.lo)) + " of " + std::to_string(q.hi - q.lo) + "]";
            error(write ? "global write out of bounds" : "global read out of bounds", x, lane, i, std::to_string(bytes) + " bytes near" + near);
            return nullptr;
        }
        if (p % bytes) {
            error("global misaligned", x, lane, i, r->name + " offset " + std::to_string(p - r->lo) + " bytes " + std::to_string(bytes));
            return nullptr;
        }
        if (!(r->flags & (write ? 2 : 1))) {
            error(write ? "write to read-only" : "read of write-only", x, lane, i, r->name);
            if (write) return nullptr;
        }
        if (write) ++r->writes;
        else ++r->reads;
        return r;
    }

    // ------------------------------------------------ cp.async
    void land_data(Copy& c) {
        if (c.landed) return;
        uint8_t* d = &mem[c.dst];
        memcpy(d, c.src, c.src_bytes);
        memset(d + c.src_bytes, 0, c.width - c.src_bytes);
        c.landed = true;
    }
    void finish_copies(Warp& x, int lane, uint32_t before_group) {
        auto& list = x.copies[lane];
        size_t kept = 0;
        for (auto& c : list) {
            if (c.group < before_group) {
                land_data(c);
                for (uint32_t q = c.dst / 4; q < (c.dst + c.width) / 4; ++q) sh[q].fly = -1;
                set_written(x, lane, c.dst, c.width);
            } else
                list[kept++] = c;
        }
        list.resize(kept);
    }

    // ------------------------------------------------ wgmma
    // Offset in shared memory of element (mn, k), 16-bit elements, by the canonical layouts (in 16-byte pieces):
    //   K-major, no swizzle:   ((8,n),2):((1,SBO),LBO)
    //   K-major, 128 B:        ((8,n),2):((8,SBO),1)            with Swizzle<3,4,3>
    //   MN-major, no swizzle:  ((1,n),(8,k)):((X,SBO),(1,LBO))
    //   MN-major, 128 B:       ((8,n),(8,k)):((1,LBO),(8,SBO))  with Swizzle<3,4,3>
    static uint32_t wg_piece(uint64_t desc, bool mn_major, int mn, int kk) {
        const uint32_t start = static_cast<uint32_t>(desc & 0x3fff) << 4;
        const uint32_t lbo = static_cast<uint32_t>(desc >> 16 & 0x3fff) << 4, sbo = static_cast<uint32_t>(desc >> 32 & 0x3fff) << 4;
        const int swizzle = static_cast<int>(desc >> 62);
        uint32_t addr;
        if (!mn_major) {
            if (swizzle == 0) addr = start + mn % 8 * 16 + mn / 8 * sbo + kk / 8 * lbo;
            else if (swizzle == 1) addr = start + mn % 8 * 128 + mn / 8 * sbo + kk / 8 * 16;
            else fatal("swizzle mode");
        } else {
            if (swizzle == 0) addr = start + mn / 8 * sbo + kk % 8 * 16 + kk / 8 * lbo;
            else if (swizzle == 1) addr = start + mn / 8 % 8 * 16 + mn / 64 * lbo + kk % 8 * 128 + kk / 8 * sbo;
            else fatal("swizzle mode");
        }
        if (swizzle == 1) addr ^= addr >> 3 & 0x70;
        return addr;
    }
    void wg_compute(Warp& x, WgOp& op) {
        const Ins& i = k.code[op.pc];
        const float* table = i.op == WGMMA_F16 ? half_table : bf_table;
        const bool ta = i.imm & 1, tb = i.imm & 2;
        const int row0 = x.id % 4 * 16;
        static thread_local float A[16][16], B[16][128], D[16][128];
        auto element = [&](uint64_t desc, bool mn_major, int mn, int kk) {
            const uint32_t at = wg_piece(desc, mn_major, mn, kk) + (mn_major ? mn % 8 : kk % 8) * 2 - options.shared_base;
            if (static_cast<uint64_t>(at) + 2 > mem.size()) return std::nanf("");
            uint16_t bits;
            memcpy(&bits, &mem[at], 2);
            return table[bits];
        };
        for (int r = 0; r < 16; ++r)
            for (int kk = 0; kk < 16; ++kk) A[r][kk] = element(op.a, ta, row0 + r, kk);
        for (int kk = 0; kk < 16; ++kk)
            for (int n = 0; n < 128; ++n) B[kk][n] = element(op.b, tb, n, kk);
        // register j of lane l: row l / 4 + 8 * (j / 2 % 2), column j / 4 * 8 + l % 4 * 2 + j % 2
        for (int j = 0; j < 64; ++j)
            for (int l = 0; l < 32; ++l)
                D[l / 4 + j / 2 % 2 * 8][j / 4 * 8 + l % 4 * 2 + j % 2] = op.scale_d ? asf(x.r32[i.regs[j] * 32 + l]) : 0.f;
        for (int r = 0; r < 16; ++r)
            for (int kk = 0; kk < 16; ++kk) {
                const float a = A[r][kk];
                for (int n = 0; n < 128; ++n) D[r][n] += a * B[kk][n];
            }
        for (int j = 0; j < 64; ++j)
            for (int l = 0; l < 32; ++l)
                x.r32[i.regs[j] * 32 + l] = asw(D[l / 4 + j / 2 % 2 * 8][j / 4 * 8 + l % 4 * 2 + j % 2]);
        op.done = true;
    }
    void wg_issue(Warp& x, int pc) {
        const Ins& i = k.code[pc];
        const uint64_t a = x.r64[i.a * 32], b = x.r64[i.b * 32];
        for (int l = 0; l < 32; ++l)
            if (x.r64[i.a * 32 + l] != a || x.r64[i.b * 32 + l] != b) {
                error("wgmma descriptors differ between lanes", x, l, i, "");
                break;
            }
        for (int which = 0; which < 2; ++which) {
            const uint64_t d = which ? b : a;
            if (d & 0x3ff8c000c000c000ull) error("wgmma descriptor has bits in reserved fields", x, 0, i, std::to_string(d));
            if (d >> 49 & 7) error("wgmma base offset is not zero", x, 0, i, "");
            if (d >> 62 == 1 && (d & 0x3fff) << 4 & 0x3ff) {
                // allowed only along K within an atom; the pattern has to start at a multiple of 1024
                ++stats["wgmma swizzled start not at 1024"];
            }
        }
        x.wg_trace.push_back(static_cast<uint64_t>(pc) * 1000003u ^ a * 7919u ^ b * 104729u);
        WgOp op{pc, a, b, x.r32[i.c * 32] != 0, false, x.wg_group, {}};
        // registers
        for (int r : i.regs) {
            if (x.seq[r] > x.fence_now) {
                error("wgmma.fence missing: sums written after the last one", x, 0, i, "register " + std::to_string(r));
                break;
            }
        }
        for (int r : i.regs) ++x.inflight[r], ++x.inflight_total;
        // memory
        std::set<uint32_t> pieces;
        const bool ta = i.imm & 1, tb = i.imm & 2;
        const int row0 = x.id % 4 * 16;
        for (int kk = 0; kk < 16; kk += ta ? 1 : 8)
            for (int r = 0; r < 16; r += ta ? 8 : 1) pieces.insert(wg_piece(a, ta, row0 + r, kk));
        for (int kk = 0; kk < 16; kk += tb ? 1 : 8)
            for (int n = 0; n < 128; n += tb ? 8 : 1) pieces.insert(wg_piece(b, tb, n, kk));
        bool told = false;
        for (uint32_t p : pieces) {
            const uint32_t off = p - options.shared_base;
            if (p < options.shared_base || static_cast<uint64_t>(off) + 16 > mem.size()) {
                if (!told) error("wgmma reads out of bounds", x, 0, i, "offset " + std::to_string(off) + " of " + std::to_string(mem.size()));
                told = true;
                continue;
            }
            op.ranges.push_back({off / 4, 4});
            for (uint32_t q = off / 4; q < off / 4 + 4; ++q) {
                Sh& s = sh[q];
                ++s.wgread;
                if (s.fly >= 0 && !told) told = true, error("wgmma reads under cp.async", x, 0, i, "offset " + std::to_string(q * 4));
                if (!s.init) {
                    ++stats["uninitialised words read by wgmma"];
                    continue;
                }
                if (s.wt < 0) continue;
                const bool own = s.wt / 32 == x.id;
                if (s.we == x.epoch && !own && !told) told = true, error("race: wgmma reads without a barrier", x, 0, i, "offset " + std::to_string(q * 4));
                const auto& f = w[s.wt / 32].fences[s.wt % 32];
                const bool published = f.size() > s.wf && (own || f[s.wf] < x.epoch);
                if (!published && !told) told = true, error("wgmma reads what was not published (fence.proxy.async)", x, 0, i, "offset " + std::to_string(q * 4) + " by thread " + std::to_string(s.wt));
            }
        }
        const bool at_once = options.wg_mode == 1 || (options.wg_mode == 2 && rng.below(2) && (x.wg.empty() || x.wg.back().done));
        if (at_once) {
            for (auto& before : x.wg)
                if (!before.done) wg_compute(x, before);
            wg_compute(x, op);
        }
        x.wg.push_back(std::move(op));
    }
    void wg_wait(Warp& x, uint32_t before_group) {
        size_t kept = 0;
        for (auto& op : x.wg) {
            if (op.group < before_group) {
                if (!op.done) wg_compute(x, op);
                for (int r : k.code[op.pc].regs) --x.inflight[r], --x.inflight_total;
                for (auto& range : op.ranges)
                    for (uint32_t q = range.first; q < range.first + range.second; ++q) {
                        Sh& s = sh[q];
                        --s.wgread;
                        if (s.re != x.epoch) s.rwarp = x.id, s.rws = static_cast<int64_t>(x.wsync) - 1;
                        else if (s.rwarp != x.id) s.rwarp = -2;
                        s.re = x.epoch, s.rt = -2;
                    }
            } else {
                if (kept != static_cast<size_t>(&op - &x.wg[0])) x.wg[kept] = std::move(op);
                ++kept;
            }
        }
        x.wg.resize(kept);
    }

    // ------------------------------------------------ one instruction for the lanes of a mask. False: needs all lanes
    static bool collective(Op op) {
        return op == BARSYNC || op == BARWARP || op == SHFL || op == LDMATRIX || op == LDMATRIXT || op == MMA_F16 ||
               op == MMA_BF16 || op == WGMMA_F16 || op == WGMMA_BF16 || op == WGFENCE || op == WGCOMMIT || op == WGWAIT;
    }

#define LANES(...)                                                    \
    do {                                                              \
        if (mask == 0xffffffffu) {                                    \
            for (int l = 0; l < 32; ++l) { __VA_ARGS__; }             \
        } else {                                                      \
            for (int l = 0; l < 32; ++l)                              \
                if (mask >> l & 1) { __VA_ARGS__; }                   \
        }                                                             \
    } while (0)

    void execute(Warp& x, const Ins& i, uint32_t mask, int pc) {
        uint32_t* R = x.r32.data();
        uint64_t* Q = x.r64.data();
        uint32_t* D = i.d >= 0 ? R + static_cast<size_t>(i.d) * 32 : nullptr;
        const uint32_t* A = i.a >= 0 && static_cast<size_t>(i.a) * 32 < x.r32.size() ? R + static_cast<size_t>(i.a) * 32 : nullptr;
        const uint32_t* B = i.b >= 0 && static_cast<size_t>(i.b) * 32 < x.r32.size() ? R + static_cast<size_t>(i.b) * 32 : nullptr;
        const uint32_t* C = i.c >= 0 ? R + static_cast<size_t>(i.c) * 32 : nullptr;
        uint64_t* D6 = i.d >= 0 && static_cast<size_t>(i.d) * 32 < x.r64.size() ? Q + static_cast<size_t>(i.d) * 32 : nullptr;
        const uint64_t* A6 = i.a >= 0 && static_cast<size_t>(i.a) * 32 < x.r64.size() ? Q + static_cast<size_t>(i.a) * 32 : nullptr;
        const uint64_t* B6 = i.b >= 0 && static_cast<size_t>(i.b) * 32 < x.r64.size() ? Q + static_cast<size_t>(i.b) * 32 : nullptr;
        if (k.has_wgmma) {
            ++x.now;
            if (x.inflight_total) {
                for (int r : i.rd)
                    if (x.inflight[r]) error("sums of a running wgmma are read", x, 0, i, "register " + std::to_string(r));
                for (int r : i.wr)
                    if (x.inflight[r]) error("sums of a running wgmma are written", x, 0, i, "register " + std::to_string(r));
            }
            for (int r : i.wr) x.seq[r] = x.now;
        }
        switch (i.op) {
            case MOV32: LANES(D[l] = A[l]); break;
            case MOV64: case CVTAGLOBAL: LANES(D6[l] = A6[l]); break;
            case MOVPACK: LANES(D[l] = (A[l] & 0xffff) | B[l] << 16); break;
            case ADD32: LANES(D[l] = A[l] + B[l]); break;
            case SUB32: LANES(D[l] = A[l] - B[l]); break;
            case MULLO32: LANES(D[l] = A[l] * B[l]); break;
            case MADLO32: LANES(D[l] = A[l] * B[l] + C[l]); break;
            case ADD64: LANES(D6[l] = A6[l] + B6[l]); break;
            case MULLO64: LANES(D6[l] = A6[l] * B6[l]); break;
            case MULWIDES: LANES(D6[l] = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(A[l])) * static_cast<int32_t>(B[l]))); break;
            case MULWIDEU: LANES(D6[l] = static_cast<uint64_t>(A[l]) * B[l]); break;
            case MULWIDEU16: LANES(D[l] = (A[l] & 0xffff) * (B[l] & 0xffff)); break;
            case SHL32: LANES(D[l] = B[l] > 31 ? 0 : A[l] << B[l]); break;
            case SHRU32: LANES(D[l] = B[l] > 31 ? 0 : A[l] >> B[l]); break;
            case SHRS32: LANES(D[l] = static_cast<uint32_t>(static_cast<int32_t>(A[l]) >> std::min<uint32_t>(B[l], 31))); break;
            case SHL64: LANES(D6[l] = B[l] > 63 ? 0 : A6[l] << B[l]); break;
            case SHRU64: LANES(D6[l] = B[l] > 63 ? 0 : A6[l] >> B[l]); break;
            case SHRS64: LANES(D6[l] = static_cast<uint64_t>(static_cast<int64_t>(A6[l]) >> std::min<uint32_t>(B[l], 63))); break;
            case SUB16: LANES(D[l] = (A[l] - B[l]) & 0xffff); break;
            case MULLO16: LANES(D[l] = (A[l] * B[l]) & 0xffff); break;
            case SHR16: LANES(D[l] = B[l] > 15 ? 0 : (A[l] & 0xffff) >> B[l]); break;
            case AND: LANES(D[l] = A[l] & B[l]); break;
            case OR: LANES(D[l] = A[l] | B[l]); break;
            case XOR: LANES(D[l] = A[l] ^ B[l]); break;
            case NOTP: LANES(D[l] = !A[l]); break;
            case AND64: LANES(D6[l] = A6[l] & B6[l]); break;
            case OR64: LANES(D6[l] = A6[l] | B6[l]); break;
            case DIVS: LANES(if (B[l] == 0) { error("division by zero", x, l, i, ""); D[l] = 0xffffffff; } else D[l] = static_cast<uint32_t>(static_cast<int32_t>(A[l]) / static_cast<int32_t>(B[l]))); break;
            case REMS: LANES(if (B[l] == 0) { error("division by zero", x, l, i, ""); D[l] = 0xffffffff; } else D[l] = static_cast<uint32_t>(static_cast<int32_t>(A[l]) % static_cast<int32_t>(B[l]))); break;
            case MAXS: LANES(D[l] = static_cast<uint32_t>(std::max(static_cast<int32_t>(A[l]), static_cast<int32_t>(B[l])))); break;
            case BFI: {
                const uint32_t* E = R + static_cast<size_t>(i.e) * 32;
                LANES(const uint32_t pos = C[l] & 0xff; const uint32_t len = E[l] & 0xff; uint32_t v = B[l];
                      for (uint32_t n = 0; n < len && pos + n < 32; ++n)
                          v = (v & ~(1u << (pos + n))) | ((A[l] >> n & 1u) << (pos + n));
                      D[l] = v);
                break;
            }
            case SELP32: LANES(D[l] = C[l] ? A[l] : B[l]); break;
            case SELP64: LANES(D6[l] = C[l] ? A6[l] : B6[l]); break;
            case SETP_S32: LANES(D[l] = compare(i.cmp, static_cast<int32_t>(A[l]), static_cast<int32_t>(B[l]))); break;
            case SETP_U32: LANES(D[l] = compare(i.cmp, A[l], B[l])); break;
            case SETP_F32: LANES(D[l] = compare_f(i.cmp, asf(A[l]), asf(B[l]))); break;
            case SETP_S64: LANES(D[l] = compare(i.cmp, static_cast<int64_t>(A6[l]), static_cast<int64_t>(B6[l]))); break;
            case FADD: LANES(D[l] = asw(asf(A[l]) + asf(B[l]))); break;
            case FMUL: LANES(D[l] = asw(asf(A[l]) * asf(B[l]))); break;
            case FMA: LANES(D[l] = asw(std::fma(asf(A[l]), asf(B[l]), asf(C[l])))); break;
            case FMARM: {
                const int was = fegetround();
                fesetround(FE_DOWNWARD);
                LANES(volatile float p = asf(A[l]); volatile float q = std::fma(p, asf(B[l]), asf(C[l])); D[l] = asw(q));
                fesetround(was);
                break;
            }
            case FDIV: LANES(D[l] = asw(asf(A[l]) / asf(B[l]))); break;
            case FNEG: LANES(D[l] = A[l] ^ 0x80000000u); break;
            case EX2: LANES(float v = std::exp2(asf(A[l])); if (std::fabs(v) < 1.17549435e-38f) v = 0; D[l] = asw(v)); break;
            case CVTSAT: LANES(float v = asf(A[l]); D[l] = asw(v != v ? 0.f : v < 0 ? 0.f : v > 1 ? 1.f : v)); break;
            case CVT_S64_S32: LANES(D6[l] = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(A[l])))); break;
            case CVT_U64_U32: LANES(D6[l] = A[l]); break;
            case CVT_U32_U64: LANES(D[l] = static_cast<uint32_t>(A6[l])); break;
            case CVT_U16_U32: case CVT_U32_U16: LANES(D[l] = A[l] & 0xffff); break;
            case CVT_F16_F32: LANES(D[l] = static_cast<uint16_t>(_cvtss_sh(asf(A[l]), _MM_FROUND_TO_NEAREST_INT))); break;
            case CVT_BF16_F32: LANES(uint32_t v = A[l]; D[l] = (v & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (v + 0x7fffu + (v >> 16 & 1)) >> 16); break;
            case CVT_F32_F16: LANES(D[l] = asw(half_table[A[l] & 0xffff])); break;
            case LDPARAM: {
                LANES(const uint64_t at = A6[l] - PARAM_BASE + static_cast<uint64_t>(i.imm);
                      if (at + static_cast<uint64_t>(i.width) * i.count > static_cast<uint64_t>(k.param_bytes)) error("parameter out of bounds", x, l, i, std::to_string(at));
                      else load_into(x, i, l, params + at));
                break;
            }
            case LDGLOBAL: case LDGLOBALNC: {
                const int bytes = i.width * i.count;
                LANES(const uintptr_t p = A6[l] + static_cast<uint64_t>(i.imm); Region* r = global_range(x, l, i, p, bytes, false);
                      static const uint8_t zeros[16] = {0};
                      if (r && i.op == LDGLOBALNC && (r->flags & 2)) error("ld.global.nc of memory that the kernel writes", x, l, i, r->name);
                      if (r && (r->flags & 2)) for (int q = 0; q < bytes; ++q) if (r->written[p - r->lo + q]) { error("global read after write", x, l, i, r->name + " offset " + std::to_string(p - r->lo)); break; }
                      load_into(x, i, l, r ? reinterpret_cast<const uint8_t*>(p) : zeros));
                break;
            }
            case STGLOBAL: {
                const int bytes = i.width * i.count;
                LANES(const uintptr_t p = A6[l] + static_cast<uint64_t>(i.imm); Region* r = global_range(x, l, i, p, bytes, true);
                      if (r) {
                          for (int q = 0; q < bytes; ++q) {
                              uint8_t& f = r->written[p - r->lo + q];
                              if (f) { error("global written twice", x, l, i, r->name + " offset " + std::to_string(p - r->lo)); break; }
                          }
                          memset(&r->written[p - r->lo], 1, bytes);
                          store_from(x, i, l, reinterpret_cast<uint8_t*>(p));
                      });
                break;
            }
            case LDSHARED: {
                const int bytes = i.width * i.count;
                LANES(uint32_t off; if (shared_range(x, l, i, A[l] + static_cast<uint32_t>(i.imm), bytes, off)) { note_read(x, l, i, off, bytes); load_into(x, i, l, &mem[off]); });
                break;
            }
            case STSHARED: {
                const int bytes = i.width * i.count;
                LANES(uint32_t off; if (shared_range(x, l, i, A[l] + static_cast<uint32_t>(i.imm), bytes, off)) {
                    check_write(x, l, i, off, bytes); set_written(x, l, off, bytes); store_from(x, i, l, &mem[off]); });
                break;
            }
            case CPASYNC: {
                LANES(uint32_t off; const uint32_t to = A[l] + static_cast<uint32_t>(i.imm); const uintptr_t from = B6[l];
                      const int src = C ? static_cast<int>(C[l]) : i.width;
                      bool good = shared_range(x, l, i, to, i.width, off);
                      if (src < 0 || src > i.width) error("cp.async src-size", x, l, i, std::to_string(src)), good = false;
                      if (from % i.width) error("global misaligned", x, l, i, "cp.async source"), good = false;
                      if (good && src) good = global_range(x, l, i, from, src, false) != nullptr;
                      if (good) {
                          check_write(x, l, i, off, i.width);
                          for (uint32_t q = off / 4; q < (off + i.width) / 4; ++q) sh[q].fly = x.id * 32 + l;
                          Copy c{off, reinterpret_cast<const uint8_t*>(from), i.width, src, x.groups[l], false};
                          if (options.async_mode == 1 || (options.async_mode == 2 && rng.below(2))) land_data(c);
                          x.copies[l].push_back(c);
                      });
                break;
            }
            case CPCOMMIT: LANES(++x.groups[l]); break;
            case CPWAIT:
                LANES(const int64_t before = static_cast<int64_t>(x.groups[l]) - i.imm; if (before > 0) finish_copies(x, l, static_cast<uint32_t>(before)));
                break;
            case FENCEPROXY: LANES(x.fences[l].push_back(x.epoch)); break;
            case BARWARP: ++x.wsync; break;
            case SHFL: {
                uint32_t out[32];
                for (int l = 0; l < 32; ++l) {
                    if (C[l] != 31) error("shfl clamp", x, l, i, std::to_string(C[l]));
                    out[l] = A[(l ^ B[l]) & 31];
                }
                for (int l = 0; l < 32; ++l) {
                    D[l] = out[l];
                    for (int r : i.regs) R[r * 32 + l] = 1;
                }
                break;
            }
            case LDMATRIX: case LDMATRIXT: {
                uint16_t m[4][8][8];
                memset(m, 0xff, sizeof m);
                for (int l = 0; l < 32; ++l) {
                    uint32_t off;
                    if (!shared_range(x, l, i, A[l] + static_cast<uint32_t>(i.imm), 16, off)) continue;
                    note_read(x, l, i, off, 16);
                    memcpy(m[l / 8][l % 8], &mem[off], 16);
                }
                for (int q = 0; q < 4; ++q)
                    for (int l = 0; l < 32; ++l) {
                        const int g = l / 4, t = l % 4 * 2;
                        const uint32_t lo = i.op == LDMATRIX ? m[q][g][t] : m[q][t][g];
                        const uint32_t hi = i.op == LDMATRIX ? m[q][g][t + 1] : m[q][t + 1][g];
                        R[i.regs[q] * 32 + l] = lo | hi << 16;
                    }
                break;
            }
            case MMA_F16: case MMA_BF16: {
                const float* table = i.op == MMA_F16 ? half_table : bf_table;
                float a[16][16], b[16][8], d[16][8];
                for (int l = 0; l < 32; ++l) {
                    const int g = l / 4, t = l % 4 * 2;
                    for (int q = 0; q < 4; ++q) {  // a: registers (g, k), (g + 8, k), (g, k + 8), (g + 8, k + 8)
                        const uint32_t v = R[i.regs[4 + q] * 32 + l];
                        a[g + q % 2 * 8][t + q / 2 * 8] = table[v & 0xffff];
                        a[g + q % 2 * 8][t + q / 2 * 8 + 1] = table[v >> 16];
                    }
                    for (int q = 0; q < 2; ++q) {
                        const uint32_t v = R[i.regs[8 + q] * 32 + l];
                        b[t + q * 8][g] = table[v & 0xffff];
                        b[t + q * 8 + 1][g] = table[v >> 16];
                    }
                    for (int q = 0; q < 4; ++q) d[g + q / 2 * 8][t + q % 2] = asf(R[i.regs[10 + q] * 32 + l]);
                }
                for (int r = 0; r < 16; ++r)
                    for (int kk = 0; kk < 16; ++kk)
                        for (int n = 0; n < 8; ++n) d[r][n] += a[r][kk] * b[kk][n];
                for (int l = 0; l < 32; ++l)
                    for (int q = 0; q < 4; ++q) R[i.regs[q] * 32 + l] = asw(d[l / 4 + q / 2 * 8][l % 4 * 2 + q % 2]);
                break;
            }
            case WGFENCE: x.fence_now = x.now; break;
            case WGMMA_F16: case WGMMA_BF16: wg_issue(x, pc); break;
            case WGCOMMIT: ++x.wg_group; break;
            case WGWAIT: {
                const int64_t before = static_cast<int64_t>(x.wg_group) - i.imm;
                if (before > 0) wg_wait(x, static_cast<uint32_t>(before));
                break;
            }
            default: fatal("execute " + i.text);
        }
    }
    template <class T>
    static uint32_t compare(Cmp c, T a, T b) {
        switch (c) {
            case EQ: return a == b;
            case NE: return a != b;
            case LT: return a < b;
            case LE: return a <= b;
            case GT: return a > b;
            default: return a >= b;
        }
    }
    static uint32_t compare_f(Cmp c, float a, float b) {
        if (a != a || b != b) return 0;  // ordered comparisons; ne too
        return compare(c, a, b);
    }
    void load_into(Warp& x, const Ins& i, int l, const uint8_t* from) {
        for (int n = 0; n < i.count; ++n) {
            uint64_t v = 0;
            memcpy(&v, from + n * i.width, i.width);
            if (i.sx && i.width < 8) {
                const int shift = 64 - 8 * i.width;
                v = static_cast<uint64_t>(static_cast<int64_t>(v << shift) >> shift);
            }
            if (i.is64) x.r64[i.regs[n] * 32 + l] = v;
            else x.r32[i.regs[n] * 32 + l] = static_cast<uint32_t>(v);
        }
    }
    void store_from(Warp& x, const Ins& i, int l, uint8_t* to) {
        for (int n = 0; n < i.count; ++n) {
            const uint64_t v = i.is64 ? x.r64[i.regs[n] * 32 + l] : x.r32[i.regs[n] * 32 + l];
            memcpy(to + n * i.width, &v, i.width);
        }
    }

    // Runs a warp until it waits at the barrier, ends, or `budget` instructions are done. False: it is stuck.
    bool run_warp(Warp& x, uint64_t budget) {
        while (budget--) {
            // merge
            for (size_t a = 0; a < x.frags.size(); ++a) {
                for (size_t b = a + 1; b < x.frags.size();) {
                    if (x.frags[a].pc == x.frags[b].pc) {
                        x.frags[a].mask |= x.frags[b].mask;
                        x.frags[a].st = 0;
                        x.frags.erase(x.frags.begin() + b);
                    } else {
                        ++b;
                    }
                }
            }
            if (x.frags.empty()) return true;
            int pick = -1;
            if (options.lanes == 0 || x.frags.size() == 1) {
                for (size_t a = 0; a < x.frags.size(); ++a)
                    if (x.frags[a].st == 0 && (pick < 0 || x.frags[a].pc < x.frags[pick].pc)) pick = static_cast<int>(a);
            } else {
                vector<int> able;
                for (size_t a = 0; a < x.frags.size(); ++a)
                    if (x.frags[a].st == 0) able.push_back(static_cast<int>(a));
                if (!able.empty()) pick = able[rng.below(static_cast<uint32_t>(able.size()))];
            }
            if (pick < 0) {
                for (auto& f : x.frags) error("lanes wait at different places for an aligned instruction", x, __builtin_ctz(f.mask), k.code[f.pc], "mask " + std::to_string(f.mask));
                return false;
            }
            Frag& f = x.frags[pick];
            const Ins& i = k.code[f.pc];
            ++k.hits[f.pc];
            uint32_t mask = f.mask;
            if (i.guard >= 0) {
                uint32_t taken = 0;
                for (int l = 0; l < 32; ++l)
                    if ((mask >> l & 1) && (x.r32[i.guard * 32 + l] != 0) != i.gneg) taken |= 1u << l;
                if (i.op == BRA) {
                    ++instructions;
                    const uint32_t rest = mask & ~taken;
                    if (taken && rest) {
                        f.mask = rest;
                        ++f.pc;
                        x.frags.push_back({i.target, taken, 0});
                        ++stats["divergent branches"];
                    } else if (taken)
                        f.pc = i.target;
                    else
                        ++f.pc;
                    continue;
                }
                mask = taken;
            }
            if (i.op == BRA) {
                f.pc = i.target;
                continue;
            }
            if (i.op == RET) {
                x.exited |= f.mask;
                for (int l = 0; l < 32; ++l)
                    if (f.mask >> l & 1 && !x.copies[l].empty()) error("cp.async not waited for at the end", x, l, i, "");
                if (x.inflight_total) error("wgmma not waited for at the end", x, 0, i, "");
                x.frags.erase(x.frags.begin() + pick);
                continue;
            }
            if (collective(i.op)) {
                if (x.exited) error("aligned instruction after lanes ended", x, 0, i, "");
                if ((f.mask | x.exited) != 0xffffffffu) {
                    f.st = 1;
                    ++stats["lanes waited for at an aligned instruction"];
                    continue;
                }
                if (mask != f.mask) error("predicated aligned instruction", x, 0, i, "");
                if (i.op == BARSYNC) {
                    x.at_barrier = true;
                    return true;
                }
            }
            ++instructions;
            execute(x, i, mask, f.pc);
            ++f.pc;
        }
        return true;
    }
    void run() {
        vector<int> order(warps);
        for (;;) {
            int live = 0, waiting = 0;
            for (auto& x : w) {
                if (!x.frags.empty()) ++live;
                if (x.at_barrier) ++waiting;
            }
            if (!live) break;
            if (waiting == live) {
                if (live != warps) error("barrier after warps ended", w[0], 0, k.code[0], "");
                int where = -1;
                for (auto& x : w)
                    if (x.at_barrier) {
                        if (where >= 0 && x.frags[0].pc != where) ++stats["warps at different bar.sync of the text"];
                        where = x.frags[0].pc;
                        x.at_barrier = false;
                        ++x.epoch;
                        ++x.frags[0].pc;
                    }
                continue;
            }
            for (int n = 0; n < warps; ++n) order[n] = options.order == 1 ? warps - 1 - n : n;
            if (options.order == 2)
                for (int n = warps - 1; n > 0; --n) std::swap(order[n], order[rng.below(n + 1)]);
            for (int n : order) {
                Warp& x = w[n];
                if (x.frags.empty() || x.at_barrier) continue;
                if (!run_warp(x, options.order == 2 ? 1 + rng.below(200) : ~0ull)) return;
            }
        }
        if (k.has_wgmma)
            for (int g = 0; g + 3 < warps; g += 4)
                for (int n = 1; n < 4; ++n)
                    if (w[g + n].wg_trace != w[g].wg_trace) error("warps of a warpgroup issue different wgmma", w[g + n], 0, k.code[0], "");
    }
};

// ---------------------------------------------------------------- fake CUDA runtime
// Kernels by the address of their host function. Filled by the constructors of other objects, before this file's own run.
std::map<const void*, string>& functions() {
    static std::map<const void*, string> made;
    return made;
}
std::set<string> granted;  // more than 48 KB of shared memory
string last_error_text;
int last_error = 0;
struct Config {
    unsigned gx, gy, gz, bx, by, bz;
    size_t shared;
    void* stream;
};
vector<Config> configs;
vector<string> launches;
std::map<string, std::array<uint64_t, 3>> per_kernel;  // launches, blocks, instructions

int launch(const string& name, Config c, void** args) {
    auto it = kernels.find(options.target + ":" + name);
    if (it == kernels.end()) fatal("no kernel " + options.target + ":" + name);
    const Kernel& k = it->second;
    const string text = options.target + " " + name + " grid " + std::to_string(c.gx) + "," + std::to_string(c.gy) + "," + std::to_string(c.gz) + " block " +
                        std::to_string(c.bx) + " shared " + std::to_string(c.shared);
    launches.push_back(text);
    if (c.gx == 0 || c.gy != 1 || c.gz != 1 || c.by != 1 || c.bz != 1 || c.bx > 1024 || c.bx % 32 || c.bx > static_cast<unsigned>(k.maxntid) || c.gx > 0x7fffffffu) return 9;
    const int allowed = granted.count(name) ? options.limit : 48 * 1024;
    if (c.shared > static_cast<size_t>(allowed)) return 1;
    rng.s = 88172645463325252ull ^ (static_cast<uint64_t>(options.seed) * 0x9E3779B97F4A7C15ull);
    auto& mine = per_kernel[options.target + " " + name];
    ++mine[0];
    for (unsigned b = 0; b < c.gx; ++b) {
        const unsigned number = options.block_order == 1 ? c.gx - 1 - b : b;
        Block block(k, static_cast<const uint8_t*>(args[0]), static_cast<int>(number), static_cast<int>(c.bx), c.shared);
        block.run();
        mine[1] += 1, mine[2] += block.instructions;
        if (error_count > 2000) break;
    }
    return 0;
}
}  // namespace

extern "C" {
// -------- control, for Python
void ptxvm_load(const char* path) { load_file(path); }
void ptxvm_options(const char* target, int order, int async_mode, int wg_mode, int lanes, uint32_t seed, uint32_t shared_base, int block_order, int limit) {
    options.target = target;
    options.order = order, options.async_mode = async_mode, options.wg_mode = wg_mode, options.lanes = lanes;
    options.seed = seed, options.shared_base = shared_base, options.block_order = block_order, options.limit = limit;
}
void ptxvm_clear() { regions.clear(), errors.clear(), launches.clear(), error_count = 0, stats.clear(); }
void ptxvm_region(uint64_t p, uint64_t bytes, int flags, const char* name) {
    Region r{p, p + bytes, flags, name, {}, 0, 0};
    if (flags & 2) r.written.assign(bytes, 0);
    regions.push_back(std::move(r));
}
uint64_t ptxvm_unwritten() {
    uint64_t n = 0;
    for (auto& r : regions)
        for (uint8_t f : r.written) n += !f;
    return n;
}
uint64_t ptxvm_error_count() { return error_count; }
const char* ptxvm_report() {
    static string text;
    text.clear();
    for (auto& l : launches) text += "launch: " + l + "\n";
    for (auto& s : stats) text += "stat: " + s.first + " = " + std::to_string(s.second) + "\n";
    for (size_t n = 0; n < errors.size() && n < 12; ++n) text += "error: " + errors[n] + "\n";
    return text.c_str();
}
const char* ptxvm_totals() {
    static string text;
    text.clear();
    for (auto& p : per_kernel)
        text += p.first + "\t" + std::to_string(p.second[0]) + "\t" + std::to_string(p.second[1]) + "\t" + std::to_string(p.second[2]) + "\n";
    return text.c_str();
}
// Per kernel that ran: instructions, of them executed; with `all`, the text of those that were not.
const char* ptxvm_coverage(int all) {
    static string text;
    text.clear();
    for (auto& p : kernels) {
        uint64_t done = 0, total = p.second.code.size(), any = 0;
        for (uint64_t h : p.second.hits) done += h > 0, any |= h;
        if (!any) continue;
        text += p.first + "\t" + std::to_string(done) + "\t" + std::to_string(total) + "\n";
        if (all)
            for (size_t n = 0; n < total; ++n)
                if (!p.second.hits[n]) text += "    " + std::to_string(n) + " " + p.second.code[n].text + "\n";
    }
    return text.c_str();
}
// -------- what the objects of nvcc want
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) { functions()[host] = name; }
unsigned __cudaPushCallConfiguration(PtxDim3 g, PtxDim3 b, size_t shared, void* stream) {
    configs.push_back({g.x, g.y, g.z, b.x, b.y, b.z, shared, stream});
    return 0;
}
int __cudaPopCallConfiguration(PtxDim3* g, PtxDim3* b, size_t* shared, void* stream) {
    Config c = configs.back();
    configs.pop_back();
    *g = {c.gx, c.gy, c.gz}, *b = {c.bx, c.by, c.bz}, *shared = c.shared, *static_cast<void**>(stream) = c.stream;
    return 0;
}
int __cudaGetKernel(void** handle, const void* host) {
    *handle = const_cast<void*>(host);
    return functions().count(host) ? 0 : 98;
}
int __cudaLaunchKernel(void* kernel, PtxDim3 g, PtxDim3 b, void** args, size_t shared, void* stream) {
    if (!functions().count(kernel)) return last_error = 98;
    return last_error = launch(functions()[kernel], {g.x, g.y, g.z, b.x, b.y, b.z, shared, stream}, args);
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
    if (attribute == 97) {  // cudaDevAttrMaxSharedMemoryPerBlockOptin
        *value = options.limit;
        return 0;
    }
    return 1;
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
    if (attribute != 8 || !functions().count(host) || value > options.limit) return last_error = 1;
    granted.insert(functions()[host]);
    return 0;
}
int cudaGetLastError() {
    const int e = last_error;
    last_error = 0;
    return e;
}
const char* cudaGetErrorString(int e) { return e == 1 ? "invalid argument" : e == 9 ? "invalid configuration argument" : e == 98 ? "invalid device function" : "error"; }
int cudaSetDevice(int) { return 0; }
}
