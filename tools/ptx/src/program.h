// Kernels as the interpreter runs them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

using std::string;
using std::vector;

// S and U: signed and unsigned. A register is 32 bits wide (predicates and 16-bit numbers too) or 64.
// clang-format off
enum Op {
    MOV32, MOV64, PACK16, UNPACK16, PACK32, UNPACK32,
    ADD16, ADD32, ADD64, SUB16, SUB32, SUB64, MUL16, MUL32, MUL64, MULHIS, MULHIU, MULWIDES, MULWIDEU, MULWIDES16,
    MULWIDEU16, MAD32, MAD64, MADWIDES, MADWIDEU, DIVS, DIVU, REMS, REMU, MINS, MINU, MAXS, MAXU, NEG32, ABS32,
    AND32, AND64, OR32, OR64, XOR32, XOR64, NOT1, NOT32, NOT64, LOP3, SHL16, SHL32, SHL64, SHRU16, SHRU32, SHRS32,
    SHRU64, SHRS64, BFI, BFEU, BFES, PRMT, SELP32, SELP64, SETP_S32, SETP_U32, SETP_F32, SETP_S64, SETP_U64,
    ADDF, SUBF, MULF, FMA, FMA_DOWN, DIVF, NEGF, ABSF, MINF, MAXF, EX2, EX2_FTZ, SATURATE,
    CONVERT, CVT_F16_F32, CVT_BF16_F32, CVT_F32_F16, CVT_F32_BF16, CVT_F16X2_F32, CVT_BF16X2_F32, CVT_F32_S32,
    CVT_F32_U32, CVT_S32_F32,
    LD_PARAM, LD_GLOBAL, LD_GLOBAL_NC, ST_GLOBAL, LD_SHARED, ST_SHARED,
    CP_ASYNC, CP_COMMIT, CP_WAIT, FENCE_PROXY, BAR_SYNC, BAR_WARP, SHFL_BFLY, SHFL_IDX, SHFL_UP, SHFL_DOWN,
    LDMATRIX, LDMATRIX_TRANS, MMA_F16, MMA_BF16,
    WGMMA_F16, WGMMA_BF16, WGMMA_FENCE, WGMMA_COMMIT, WGMMA_WAIT,
    BRA, RET
};
// clang-format on
enum Compare { EQ, NE, LT, LE, GT, GE };
enum Combine { ALONE, WITH_AND, WITH_OR, WITH_XOR };

struct Instruction {
    Op op = RET;
    int guard = -1;  // a predicate
    bool negated = false;
    int d = -1, a = -1, b = -1, c = -1, e = -1;  // registers
    int64_t imm = 0;  // offset of an address; groups that a wait leaves; transposed operands of wgmma
    Compare compare = EQ;
    Combine combine = ALONE;
    int target = -1;             // of a branch
    int width = 0, count = 1;    // bytes of an element and elements; bits of the result of CONVERT
    bool is_wide = false, is_signed = false;  // data in 64-bit registers; sign-extended
    vector<int> data;            // registers in memory accesses and matrices; the second predicate of setp and shfl
    vector<int> reads, writes;   // 32-bit registers
    string text;
};

struct SharedSymbol {
    bool is_wide;
    int reg;
    uint32_t offset;
};

struct Kernel {
    string name, target;
    vector<Instruction> code;
    int narrow = 0, wide = 0;  // registers of 32 and of 64 bits
    vector<std::pair<int, uint32_t>> constants32;
    vector<std::pair<int, uint64_t>> constants64;
    vector<SharedSymbol> shared_symbols;
    vector<std::pair<int, int>> params;  // offset, bytes
    int param_bytes = 0, most_threads = 1024;
    uint32_t static_shared = 0;
    int unit_bits = 2;  // races are found per 2^n bytes of shared memory: the narrowest access
    bool has_wgmma = false;
};

// The registers that every kernel has, in this order.
enum Special { TID, CTAID, NTID, NCTAID, LANEID, ZERO, SPECIALS };

// Where parameters begin in the addresses of ld.param.
constexpr uint64_t kParamBase = 0xAAAA000000000000ull;

// The kernels of a module. Throws std::runtime_error for what the interpreter does not know.
vector<Kernel> parse(const string& module);

}  // namespace ptx
