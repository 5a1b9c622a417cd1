#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <sstream>

namespace ptx {

vector<string> split(const string& s) {
    vector<string> parts;
    int depth = 0;
    string part;
    for (char c : s) {
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c == ',' && depth == 0) {
            parts.push_back(trim(part));
            part.clear();
        } else {
            part += c;
        }
    }
    if (!trim(part).empty()) parts.push_back(trim(part));
    return parts;
}

vector<string> elements(const string& operand) {
    const string s = trim(operand);
    return s.empty() || s[0] != '{' ? vector<string>{s} : split(s.substr(1, s.size() - 2));
}

static bool is_immediate(const string& s) { return !s.empty() && (isdigit(s[0]) || s[0] == '-'); }

int64_t immediate(const string& s) {
    if (starts(s, "0f") || starts(s, "0F")) return static_cast<int64_t>(strtoull(s.c_str() + 2, nullptr, 16));
    if (s[0] == '-') return strtoll(s.c_str(), nullptr, 0);
    return static_cast<int64_t>(strtoull(s.c_str(), nullptr, 0));
}

static int bytes_of(const string& type) { return type == ".pred" ? 4 : atoi(type.c_str() + 2) / 8; }

// ---- registers and symbols

void Parser::declare(const string& name, const string& type) {
    const bool is_wide = bytes_of(type) == 8;
    registers_[name] = {is_wide, is_wide ? kernel.wide++ : kernel.narrow++};
}

// .reg .type name<count>, or .reg .type name, name
void Parser::declare_all(const string& statement) {
    std::istringstream in(statement);
    string reg, type, rest;
    in >> reg >> type;
    std::getline(in, rest);
    for (const string& name : split(rest)) {
        const size_t range = name.find('<');
        if (range != string::npos) {
            for (int n = 0; n < atoi(name.c_str() + range + 1); ++n)
                declare(name.substr(0, range) + std::to_string(n), type);
            continue;
        }
        const string known = scopes_.size() > 1 ? name + "@" + std::to_string(unique_++) : name;
        scopes_.back()[name] = known;
        declare(known, type);
    }
}

string Parser::resolve(const string& name) const {
    for (size_t i = scopes_.size(); i-- > 0;)
        if (const auto found = scopes_[i].find(name); found != scopes_[i].end()) return found->second;
    return name;
}

bool Parser::is_wide(const string& operand) const {
    const auto found = registers_.find(resolve(trim(operand)));
    return found != registers_.end() && found->second.is_wide;
}

static uint32_t round_up(uint32_t value, uint32_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A register that holds the address of an array in shared memory. Arrays lie in the order of their first use.
int Parser::shared(const string& name, bool wide) {
    const SharedArray& array = arrays.at(name);
    const string key = "@" + name + (wide ? "64" : "32");
    if (!registers_.count(key)) {
        declare(key, wide ? ".b64" : ".b32");
        if (array.bytes && !placed_.count(name)) {
            placed_[name] = round_up(kernel.static_shared, array.align);
            kernel.static_shared = placed_[name] + array.bytes;
        }
        if (!array.bytes) dynamic_.push_back({kernel.shared_symbols.size(), name});
        kernel.shared_symbols.push_back({wide, registers_[key].number, array.bytes ? placed_[name] : 0});
    }
    return registers_[key].number;
}

void Parser::place_dynamic_shared() {
    for (const auto& symbol : dynamic_) {
        kernel.static_shared = round_up(kernel.static_shared, arrays.at(symbol.second).align);
        kernel.shared_symbols[symbol.first].offset = kernel.static_shared;
    }
}

int Parser::narrow(const string& operand) {
    const string s = trim(operand);
    if (is_immediate(s)) {
        const auto value = static_cast<uint32_t>(immediate(s));
        const auto made = constants32_.try_emplace(value, kernel.narrow);
        if (made.second) kernel.constants32.push_back({kernel.narrow++, value});
        return made.first->second;
    }
    static const std::map<string, Special> specials = {
        {"%tid.x", TID}, {"%tid.y", ZERO}, {"%tid.z", ZERO},
        {"%ctaid.x", CTAID}, {"%ctaid.y", ZERO}, {"%ctaid.z", ZERO},
        {"%ntid.x", NTID}, {"%nctaid.x", NCTAID}, {"%laneid", LANEID}};
    if (const auto special = specials.find(s); special != specials.end()) return special->second;
    if (arrays.count(s)) return shared(s, false);
    const auto found = registers_.find(resolve(s));
    if (found == registers_.end() || found->second.is_wide) unknown("32-bit operand '" + s + "'");
    return found->second.number;
}

int Parser::wide(const string& operand) {
    const string s = trim(operand);
    const auto param = params.find(s);
    if (param != params.end() || is_immediate(s)) {
        const uint64_t value = param != params.end() ? param->second : static_cast<uint64_t>(immediate(s));
        const auto made = constants64_.try_emplace(value, kernel.wide);
        if (made.second) kernel.constants64.push_back({kernel.wide++, value});
        return made.first->second;
    }
    if (arrays.count(s)) return shared(s, true);
    const auto found = registers_.find(resolve(s));
    if (found == registers_.end() || !found->second.is_wide) unknown("64-bit operand '" + s + "'");
    return found->second.number;
}

// [base] or [base+offset]
void Parser::address(Instruction& i, const string& operand, bool is_wide) {
    if (operand.empty() || operand[0] != '[') unknown("address " + operand);
    const string inside = operand.substr(1, operand.size() - 2);
    const size_t plus = inside.find('+');
    i.imm = plus == string::npos ? 0 : immediate(trim(inside.substr(plus + 1)));
    const string base = trim(inside.substr(0, plus));
    i.a = is_wide ? wide(base) : narrow(base);
}

// ---- statements

void Parser::statement(const string& text) {
    string s = trim(text);
    if (s.empty() || starts(s, ".pragma")) return;
    if (starts(s, ".reg")) return declare_all(s);
    if (s[0] == '.') unknown("directive " + s);
    Instruction i;
    i.text = s.substr(0, 160);
    if (s[0] == '@') {
        const size_t space = s.find_first_of(" \t");
        i.negated = s[1] == '!';
        i.guard = narrow(s.substr(1 + i.negated, space - 1 - i.negated));
        s = trim(s.substr(space));
    }
    const size_t space = s.find_first_of(" \t");
    try {
        decode(i, s.substr(0, space), space == string::npos ? vector<string>{} : split(s.substr(space)));
    } catch (const std::exception& error) {
        throw std::runtime_error(string(error.what()) + " in '" + i.text + "' of " + kernel.name);
    }
    kernel.code.push_back(i);
}

void Parser::body(const string& text) {
    kernel.narrow = SPECIALS;
    scopes_.push_back({});
    for (size_t at = 0; (at = text.find_first_not_of(" \t\n\r", at)) != string::npos;) {
        if (text[at] == '{' || text[at] == '}') {
            if (text[at++] == '{') scopes_.push_back({});
            else scopes_.pop_back();
            continue;
        }
        size_t end = at;
        while (isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_' || text[end] == '$') ++end;
        if (end > at && text[end] == ':') {
            labels_[text.substr(at, end - at)] = static_cast<int>(kernel.code.size());
            at = end + 1;
            continue;
        }
        end = text.find(';', at);
        if (end == string::npos) unknown("no ; after " + text.substr(at, 80));
        statement(text.substr(at, end - at));
        at = end + 1;
    }
    for (const auto& branch : branches_) {
        if (!labels_.count(branch.second)) unknown("label " + branch.second);
        kernel.code[branch.first].target = labels_[branch.second];
    }
    place_dynamic_shared();
}

// ---- modules

// Without comments and debugging information.
static string cleaned(const string& module) {
    std::istringstream in(module);
    string text, line;
    while (std::getline(in, line)) {
        line = line.substr(0, line.find("//"));
        const string s = trim(line);
        if (starts(s, ".section")) break;
        if (!starts(s, ".loc") && !starts(s, ".file")) text += line + "\n";
    }
    return text;
}

// Every ".shared .align N .b8 name[bytes];" of the module, wherever it stands.
static std::map<string, SharedArray> shared_arrays(string& text) {
    std::map<string, SharedArray> arrays;
    for (size_t at; (at = text.find(".shared .align ")) != string::npos;) {
        const size_t semicolon = text.find(';', at);
        std::istringstream in(text.substr(at, semicolon - at));
        string shared, align, type, name;
        uint32_t alignment;
        in >> shared >> align >> alignment >> type >> name;
        const size_t bracket = name.find('[');
        const int count = bracket == string::npos ? 1 : atoi(name.c_str() + bracket + 1);
        arrays[name.substr(0, bracket)] = {static_cast<uint32_t>(count * bytes_of(type)), alignment};
        const size_t line = text.rfind('\n', at) + 1;
        text.replace(line, semicolon + 1 - line, "");
    }
    return arrays;
}

// ".param .u64 .ptr .global .align 1 name" or ".param .align 8 .b8 name[bytes]"
static void add_param(Kernel& kernel, std::map<string, uint64_t>& params, const string& declaration) {
    std::istringstream in(declaration);
    string word, type, name;
    int align = 0;
    bool is_pointer = false;
    while (in >> word) {
        if (word == ".ptr") is_pointer = true;
        else if (word == ".align") {
            in >> word;
            if (!is_pointer) align = atoi(word.c_str());
        } else if (word[0] == '.' && word.size() > 2 && isdigit(word[2])) type = word;
        else if (word[0] != '.') name = word;
    }
    const size_t bracket = name.find('[');
    const int size = bytes_of(type) * (bracket == string::npos ? 1 : atoi(name.c_str() + bracket + 1));
    const auto offset = static_cast<int>(round_up(static_cast<uint32_t>(kernel.param_bytes), align ? align : size));
    params[name.substr(0, bracket)] = kParamBase + static_cast<uint64_t>(offset);
    kernel.params.push_back({offset, size});
    kernel.param_bytes = offset + size;
}

vector<Kernel> parse(const string& module) {
    string text = cleaned(module);
    const size_t at = text.find(".target") + 7;
    const string target = trim(text.substr(at, text.find_first_of("\n,", at) - at));
    const std::map<string, SharedArray> arrays = shared_arrays(text);
    vector<Kernel> kernels;
    for (size_t entry = 0; (entry = text.find(".entry", entry)) != string::npos;) {
        const size_t open = text.find('(', entry), close = text.find(')', open), brace = text.find('{', close);
        Kernel kernel;
        kernel.name = trim(text.substr(entry + 6, open - entry - 6));
        kernel.target = target;
        std::map<string, uint64_t> params;
        for (const string& declaration : split(text.substr(open + 1, close - open - 1)))
            add_param(kernel, params, declaration);
        const string head = text.substr(close, brace - close);
        const size_t threads = std::min(head.find(".maxntid"), head.find(".reqntid"));
        if (threads != string::npos) kernel.most_threads = atoi(head.c_str() + threads + 8);
        size_t end = brace + 1;
        for (int depth = 1; depth; ++end) depth += (text[end] == '{') - (text[end] == '}');
        Parser(kernel, arrays, params).body(text.substr(brace + 1, end - brace - 2));
        kernels.push_back(std::move(kernel));
        entry = end;
    }
    return kernels;
}

}  // namespace ptx
