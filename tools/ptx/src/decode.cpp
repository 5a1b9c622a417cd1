// One instruction: its name and operands into an Instruction.
#include <algorithm>
#include <map>
#include <sstream>

#include "parser.h"

namespace ptx {
namespace {

struct Form {
    Op op;
    const char* files;  // of the result and the operands: 3 for 32 bits, 6 for 64
};
struct Row {
    const char* name;
    const char* types;
    Form form;
};

const Row kRows[] = {
    {"add", "s16 u16", {ADD16, "333"}},
    {"add", "s32 u32", {ADD32, "333"}},
    {"add", "s64 u64", {ADD64, "666"}},
    {"sub", "s16 u16", {SUB16, "333"}},
    {"sub", "s32 u32", {SUB32, "333"}},
    {"sub", "s64 u64", {SUB64, "666"}},
    {"mul.lo", "s16 u16", {MUL16, "333"}},
    {"mul.lo", "s32 u32", {MUL32, "333"}},
    {"mul.lo", "s64 u64", {MUL64, "666"}},
    {"mul.hi", "s32", {MULHIS, "333"}},
    {"mul.hi", "u32", {MULHIU, "333"}},
    {"mul.wide", "s32", {MULWIDES, "633"}},
    {"mul.wide", "u32", {MULWIDEU, "633"}},
    {"mul.wide", "s16", {MULWIDES16, "333"}},
    {"mul.wide", "u16", {MULWIDEU16, "333"}},
    {"mad.lo", "s32 u32", {MAD32, "3333"}},
    {"mad.lo", "s64 u64", {MAD64, "6666"}},
    {"mad.wide", "s32", {MADWIDES, "6336"}},
    {"mad.wide", "u32", {MADWIDEU, "6336"}},
    {"div", "s32", {DIVS, "333"}},
    {"div", "u32", {DIVU, "333"}},
    {"rem", "s32", {REMS, "333"}},
    {"rem", "u32", {REMU, "333"}},
    {"min", "s32", {MINS, "333"}},
    {"min", "u32", {MINU, "333"}},
    {"max", "s32", {MAXS, "333"}},
    {"max", "u32", {MAXU, "333"}},
    {"neg", "s32", {NEG32, "33"}},
    {"abs", "s32", {ABS32, "33"}},
    {"and", "b16 b32 pred", {AND32, "333"}},
    {"and", "b64", {AND64, "666"}},
    {"or", "b16 b32 pred", {OR32, "333"}},
    {"or", "b64", {OR64, "666"}},
    {"xor", "b16 b32 pred", {XOR32, "333"}},
    {"xor", "b64", {XOR64, "666"}},
    {"not", "pred", {NOT1, "33"}},
    {"not", "b32", {NOT32, "33"}},
    {"not", "b64", {NOT64, "66"}},
    {"lop3", "b32", {LOP3, "33333"}},
    {"shl", "b16", {SHL16, "333"}},
    {"shl", "b32", {SHL32, "333"}},
    {"shl", "b64", {SHL64, "663"}},
    {"shr", "u16 b16", {SHRU16, "333"}},
    {"shr", "u32 b32", {SHRU32, "333"}},
    {"shr", "s32", {SHRS32, "333"}},
    {"shr", "u64 b64", {SHRU64, "663"}},
    {"shr", "s64", {SHRS64, "663"}},
    {"bfi", "b32", {BFI, "33333"}},
    {"bfe", "u32", {BFEU, "3333"}},
    {"bfe", "s32", {BFES, "3333"}},
    {"prmt", "b32", {PRMT, "3333"}},
    {"selp", "b16 u16 s16 b32 u32 s32 f32", {SELP32, "3333"}},
    {"selp", "b64 u64 s64", {SELP64, "6663"}},
    {"add", "f32", {ADDF, "333"}},
    {"sub", "f32", {SUBF, "333"}},
    {"mul", "f32", {MULF, "333"}},
    {"fma.rn", "f32", {FMA, "3333"}},
    {"fma.rm", "f32", {FMA_DOWN, "3333"}},
    {"div.rn", "f32", {DIVF, "333"}},
    {"div.full", "f32", {DIVF, "333"}},
    {"neg", "f32", {NEGF, "33"}},
    {"abs", "f32", {ABSF, "33"}},
    {"min", "f32", {MINF, "333"}},
    {"max", "f32", {MAXF, "333"}},
    {"ex2.approx", "f32", {EX2, "33"}},
    {"ex2.approx.ftz", "f32", {EX2_FTZ, "33"}},
    {"cvt.sat.f32", "f32", {SATURATE, "33"}},
    {"cvt.rn.f16", "f32", {CVT_F16_F32, "33"}},
    {"cvt.rn.bf16", "f32", {CVT_BF16_F32, "33"}},
    {"cvt.f32", "f16", {CVT_F32_F16, "33"}},
    {"cvt.f32", "bf16", {CVT_F32_BF16, "33"}},
    {"cvt.rn.f16x2", "f32", {CVT_F16X2_F32, "333"}},
    {"cvt.rn.bf16x2", "f32", {CVT_BF16X2_F32, "333"}},
    {"cvt.rn.f32", "s32", {CVT_F32_S32, "33"}},
    {"cvt.rn.f32", "u32", {CVT_F32_U32, "33"}},
    {"cvt.rzi.s32", "f32", {CVT_S32_F32, "33"}},
    {"cvta.to.global", "u64", {MOV64, "66"}},
    // Addresses of shared memory are the same in the generic space, which kernels here only pass on.
    {"cvta.to.shared", "u64", {MOV64, "66"}},
    {"cvta.shared", "u64", {MOV64, "66"}},
    {"wgmma.fence.sync", "aligned", {WGMMA_FENCE, ""}},
    {"wgmma.commit_group.sync", "aligned", {WGMMA_COMMIT, ""}},
    {"cp.async", "commit_group", {CP_COMMIT, ""}},
    {"fence.proxy.async", "shared::cta", {FENCE_PROXY, ""}},
    {"bar.warp", "sync", {BAR_WARP, "3"}},
};

std::map<string, Form> make_forms() {
    std::map<string, Form> forms;
    for (const Row& row : kRows) {
        std::istringstream types(row.types);
        for (string type; types >> type;) forms[string(row.name) + "." + type] = row.form;
    }
    forms["ret"] = {RET, ""};
    return forms;
}

vector<string> parts_of(const string& op) {
    vector<string> parts;
    std::istringstream in(op);
    for (string part; std::getline(in, part, '.');) parts.push_back(part);
    return parts;
}

int bits_of(const string& type) { return atoi(type.c_str() + 1); }

}  // namespace

void Parser::decode(Instruction& i, const string& op, const vector<string>& o) {
    if (decode_simple(i, op, o)) return;
    if (op == "bra" || op == "bra.uni") {
        i.op = BRA;
        branches_.push_back({kernel.code.size(), o.at(0)});
        return;
    }
    if (starts(op, "mov.")) return decode_move(i, op, o);
    if (starts(op, "setp.")) return decode_setp(i, op, o);
    if (starts(op, "cvt.")) return decode_convert(i, op, o);
    if (starts(op, "ld.") || starts(op, "st.") || starts(op, "cp.async.c")) return decode_memory(i, op, o);
    if (starts(op, "wgmma.")) return decode_wgmma(i, op, o);
    decode_warp(i, op, o);
}

bool Parser::decode_simple(Instruction& i, const string& op, const vector<string>& o) {
    static const std::map<string, Form> forms = make_forms();
    const auto found = forms.find(op);
    if (found == forms.end()) return false;
    i.op = found->second.op;
    const string files = found->second.files;
    if (o.size() != files.size()) unknown("number of operands");
    int* const registers[] = {&i.d, &i.a, &i.b, &i.c, &i.e};
    for (size_t n = 0; n < files.size(); ++n) {
        *registers[n] = files[n] == '6' ? wide(o[n]) : narrow(o[n]);
        if (files[n] == '3') (n ? i.reads : i.writes).push_back(*registers[n]);
    }
    return true;
}

// mov.b32 d, {a, b} and mov.b32 {d, e}, a pack and unpack halves; the others copy.
void Parser::decode_move(Instruction& i, const string& op, const vector<string>& o) {
    const bool is_64 = op.substr(op.size() - 2) == "64";
    if (o[1][0] == '{') {
        const vector<string> halves = elements(o[1]);
        i.op = is_64 ? PACK32 : PACK16;
        i.d = is_64 ? wide(o[0]) : narrow(o[0]);
        i.a = narrow(halves.at(0)), i.b = narrow(halves.at(1));
        i.reads = {i.a, i.b};
        if (!is_64) i.writes = {i.d};
    } else if (o[0][0] == '{') {
        const vector<string> halves = elements(o[0]);
        i.op = is_64 ? UNPACK32 : UNPACK16;
        i.d = narrow(halves.at(0)), i.e = narrow(halves.at(1));
        i.a = is_64 ? wide(o[1]) : narrow(o[1]);
        i.writes = {i.d, i.e};
        if (!is_64) i.reads = {i.a};
    } else {
        i.op = is_64 ? MOV64 : op.substr(op.size() - 2) == "16" ? CONVERT : MOV32;
        i.width = 16, i.imm = 16;  // of CONVERT
        i.d = is_64 ? wide(o[0]) : narrow(o[0]);
        i.a = is_64 ? wide(o[1]) : narrow(o[1]);
        if (!is_64) i.writes = {i.d}, i.reads = {i.a};
    }
}

// setp.lt[.and].s32 p[|q], a, b[, c]
void Parser::decode_setp(Instruction& i, const string& op, const vector<string>& o) {
    static const std::map<string, Compare> compares = {{"eq", EQ}, {"ne", NE}, {"lt", LT}, {"le", LE}, {"gt", GT},
                                                       {"ge", GE}, {"lo", LT}, {"ls", LE}, {"hi", GT}, {"hs", GE}};
    static const std::map<string, Combine> combines = {{"and", WITH_AND}, {"or", WITH_OR}, {"xor", WITH_XOR}};
    static const std::map<string, Op> ops = {{"s32", SETP_S32}, {"u32", SETP_U32}, {"b32", SETP_U32}, {"u16", SETP_U32},
                                             {"b16", SETP_U32}, {"f32", SETP_F32}, {"s64", SETP_S64}, {"u64", SETP_U64},
                                             {"b64", SETP_U64}};
    const vector<string> parts = parts_of(op);
    const auto found = ops.find(parts.back());
    if (found == ops.end() || !compares.count(parts[1])) unknown(op);
    i.op = found->second;
    i.compare = compares.at(parts[1]);
    if (parts.size() == 4) i.combine = combines.at(parts[2]), i.c = narrow(o.at(3));
    const bool is_64 = i.op == SETP_S64 || i.op == SETP_U64;
    const size_t bar = o[0].find('|');
    i.d = narrow(o[0].substr(0, bar));
    if (bar != string::npos) i.data = {narrow(o[0].substr(bar + 1))};
    i.a = is_64 ? wide(o[1]) : narrow(o[1]);
    i.b = is_64 ? wide(o[2]) : narrow(o[2]);
    i.writes = {i.d};
    if (!is_64) i.reads = {i.a, i.b};
}

// Between integers: cvt.u64.s32 d, a. A value of fewer than 32 bits lies in its register with zeros above.
void Parser::decode_convert(Instruction& i, const string& op, const vector<string>& o) {
    const vector<string> parts = parts_of(op);
    if (parts.size() != 3 || string("sub").find(parts[1][0]) == string::npos ||
        string("sub").find(parts[2][0]) == string::npos)
        unknown(op);
    i.op = CONVERT;
    i.width = bits_of(parts[1]);
    i.imm = bits_of(parts[2]);
    i.is_signed = parts[2][0] == 's';
    i.d = i.width == 64 ? wide(o[0]) : narrow(o[0]);
    i.a = i.imm == 64 ? wide(o[1]) : narrow(o[1]);
    if (i.width < 64) i.writes = {i.d};
    if (i.imm < 64) i.reads = {i.a};
}

void Parser::decode_memory(Instruction& i, const string& op, const vector<string>& o) {
    if (starts(op, "cp.async.")) {  // cp.async.cg.shared.global [to], [from], bytes[, bytes that are not zeros]
        if (op != "cp.async.cg.shared.global" && op != "cp.async.ca.shared.global") unknown(op);
        i.op = CP_ASYNC;
        i.width = static_cast<int>(immediate(o[2]));
        if (op[9] == 'g' && i.width != 16) unknown("bytes of cp.async.cg");
        Instruction from;
        address(from, o[1], true);
        address(i, o[0], false);
        if (from.imm) unknown("offset of a source");
        i.b = from.a;
        if (o.size() > 3) i.c = narrow(o[3]);
        return;
    }
    vector<string> parts = parts_of(op);
    const bool is_load = parts[0] == "ld";
    bool is_constant = false;
    const string space = parts[1] == "shared::cta" ? "shared" : parts[1], type = parts.back();
    for (size_t n = 2; n + 1 < parts.size(); ++n) {
        if (parts[n] == "nc") is_constant = true;
        else if (parts[n] == "v2" || parts[n] == "v4") i.count = parts[n][1] - '0';
        else if (!starts(parts[n], "L1::") && !starts(parts[n], "L2::")) unknown(op);  // hints for caches
    }
    if (space == "param" && is_load) i.op = LD_PARAM;
    else if (space == "global") i.op = !is_load ? ST_GLOBAL : is_constant ? LD_GLOBAL_NC : LD_GLOBAL;
    else if (space == "shared") i.op = is_load ? LD_SHARED : ST_SHARED;
    else unknown(op);
    i.width = bits_of(type) / 8;
    i.is_signed = type[0] == 's';
    for (const string& name : elements(o[is_load ? 0 : 1])) {
        i.is_wide = is_wide(name) || (i.width == 8 && isdigit(name[0]));
        i.data.push_back(i.is_wide ? wide(name) : narrow(name));
        if (!i.is_wide) (is_load ? i.writes : i.reads).push_back(i.data.back());
    }
    if (static_cast<int>(i.data.size()) != i.count) unknown("number of elements");
    address(i, o[is_load ? 1 : 0], space != "shared");
    if (space == "shared" && i.width * i.count < 4)
        kernel.unit_bits = std::min(kernel.unit_bits, i.width * i.count / 2);
}

void Parser::decode_warp(Instruction& i, const string& op, const vector<string>& o) {
    static const std::map<string, Op> shuffles = {{"shfl.sync.bfly.b32", SHFL_BFLY}, {"shfl.sync.idx.b32", SHFL_IDX},
                                                  {"shfl.sync.up.b32", SHFL_UP}, {"shfl.sync.down.b32", SHFL_DOWN}};
    if (op == "bar.sync" || op == "barrier.sync.aligned" || op == "barrier.sync") {
        i.op = BAR_SYNC;
        if (o.size() != 1 || immediate(o[0]) != 0) unknown("barrier of a part of the threads");
    } else if (op == "cp.async.wait_group" || op == "cp.async.wait_all") {
        i.op = CP_WAIT;
        i.imm = o.empty() ? 0 : immediate(o[0]);
    } else if (shuffles.count(op)) {
        i.op = shuffles.at(op);
        const size_t bar = o[0].find('|');
        i.d = narrow(o[0].substr(0, bar));
        if (bar != string::npos) i.data = {narrow(o[0].substr(bar + 1))};
        i.a = narrow(o[1]), i.b = narrow(o[2]), i.c = narrow(o[3]), i.e = narrow(o[4]);
        i.writes = {i.d}, i.reads = {i.a};
    } else if (starts(op, "ldmatrix.sync.aligned.m8n8.x")) {
        const bool is_transposed = op.find(".trans.") != string::npos;
        i.op = is_transposed ? LDMATRIX_TRANS : LDMATRIX;
        for (const string& name : elements(o[0])) i.data.push_back(narrow(name));
        const string expected = "ldmatrix.sync.aligned.m8n8.x" + std::to_string(i.data.size()) +
                                (is_transposed ? ".trans" : "") + ".shared.b16";
        if (op != expected) unknown(op);
        address(i, o[1], false);
        i.writes = i.data;
    } else if (starts(op, "mma.sync")) {
        const string shape = "mma.sync.aligned.m16n8k16.row.col.f32.";
        if (op == shape + "f16.f16.f32") i.op = MMA_F16;
        else if (op == shape + "bf16.bf16.f32") i.op = MMA_BF16;
        else unknown(op);
        for (const string& matrix : o)  // d, a, b, c
            for (const string& name : elements(matrix)) i.data.push_back(narrow(name));
        if (i.data.size() != 14) unknown("operands of mma");
        i.writes = {i.data.begin(), i.data.begin() + 4};
        i.reads = {i.data.begin() + 4, i.data.end()};
    } else {
        unknown("instruction " + op);
    }
}

// wgmma.mma_async {64 sums}, descriptor of a, of b, whether to add, scale of a, of b, transpose a, b
void Parser::decode_wgmma(Instruction& i, const string& op, const vector<string>& o) {
    if (op == "wgmma.wait_group.sync.aligned") {
        i.op = WGMMA_WAIT;
        i.imm = immediate(o[0]);
        return;
    }
    const string shape = "wgmma.mma_async.sync.aligned.m64n128k16.f32.";
    if (op == shape + "f16.f16") i.op = WGMMA_F16;
    else if (op == shape + "bf16.bf16") i.op = WGMMA_BF16;
    else unknown(op);
    for (const string& name : elements(o[0])) i.data.push_back(narrow(name));
    if (i.data.size() != 64 || o.size() != 8 || immediate(o[4]) != 1 || immediate(o[5]) != 1)
        unknown("operands of wgmma");
    i.a = wide(o[1]), i.b = wide(o[2]), i.c = narrow(o[3]);
    i.imm = immediate(o[6]) | immediate(o[7]) << 1;
    kernel.has_wgmma = true;
}

}  // namespace ptx
