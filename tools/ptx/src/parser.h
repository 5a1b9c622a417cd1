// The text of one kernel into instructions.
#pragma once

#include <map>
#include <stdexcept>

#include "program.h"

namespace ptx {

[[noreturn]] inline void unknown(const string& what) { throw std::runtime_error("PTX interpreter: " + what); }

inline string trim(const string& s) {
    const size_t first = s.find_first_not_of(" \t\n\r"), last = s.find_last_not_of(" \t\n\r");
    return first == string::npos ? "" : s.substr(first, last - first + 1);
}
inline bool starts(const string& s, const char* with) { return s.rfind(with, 0) == 0; }
vector<string> split(const string& s);  // at commas outside of braces and brackets

struct SharedArray {
    uint32_t bytes, align;  // bytes 0: the dynamic part
};

class Parser {
  public:
    // params: their addresses.
    Parser(Kernel& kernel, const std::map<string, SharedArray>& arrays, const std::map<string, uint64_t>& params)
        : kernel(kernel), arrays(arrays), params(params) {}

    void body(const string& text);

  private:
    Kernel& kernel;
    const std::map<string, SharedArray>& arrays;
    const std::map<string, uint64_t>& params;

    struct Register {
        bool is_wide;
        int number;
    };
    vector<std::map<string, string>> scopes_;  // names in nested braces
    std::map<string, Register> registers_;
    std::map<string, int> labels_;
    vector<std::pair<size_t, string>> branches_;
    std::map<uint32_t, int> constants32_;
    std::map<uint64_t, int> constants64_;
    std::map<string, uint32_t> placed_;  // shared arrays that the kernel uses
    vector<std::pair<size_t, string>> dynamic_;
    int unique_ = 0;

    void declare(const string& name, const string& type);
    void declare_all(const string& statement);
    void statement(const string& text);
    void place_dynamic_shared();

    string resolve(const string& name) const;
    int shared(const string& name, bool wide);
    int narrow(const string& operand);
    int wide(const string& operand);
    bool is_wide(const string& operand) const;
    void address(Instruction& i, const string& operand, bool is_wide);

    void decode(Instruction& i, const string& op, const vector<string>& operands);
    bool decode_simple(Instruction& i, const string& op, const vector<string>& operands);
    void decode_move(Instruction& i, const string& op, const vector<string>& operands);
    void decode_setp(Instruction& i, const string& op, const vector<string>& operands);
    void decode_convert(Instruction& i, const string& op, const vector<string>& operands);
    void decode_memory(Instruction& i, const string& op, const vector<string>& operands);
    void decode_warp(Instruction& i, const string& op, const vector<string>& operands);
    void decode_wgmma(Instruction& i, const string& op, const vector<string>& operands);
};

int64_t immediate(const string& operand);
vector<string> elements(const string& operand);  // of {a, b}, or of a alone

}  // namespace ptx
