// What each instruction computes.
#include <immintrin.h>

#include <algorithm>
#include <cfenv>
#include <cmath>

#include "machine.h"

#pragma STDC FENV_ACCESS ON

namespace ptx {

static int32_t s32(uint32_t v) { return static_cast<int32_t>(v); }
static int64_t s64(uint64_t v) { return static_cast<int64_t>(v); }
static uint32_t u32(int64_t v) { return static_cast<uint32_t>(v); }

struct HalfTable {
    float values[65536];
    HalfTable() {
        for (int n = 0; n < 65536; ++n) values[n] = _cvtsh_ss(static_cast<unsigned short>(n));
    }
};
static const HalfTable half_table;
float half_to_float(uint32_t bits) { return half_table.values[bits & 0xffff]; }
float bfloat_to_float(uint32_t bits) { return as_float(bits << 16); }
static uint32_t to_half(uint32_t v) { return static_cast<uint16_t>(_cvtss_sh(as_float(v), _MM_FROUND_TO_NEAREST_INT)); }
static uint32_t to_bfloat(uint32_t v) {
    const bool is_nan = (v & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? 0x7fffu : (v + 0x7fffu + (v >> 16 & 1)) >> 16;
}

template <class T>
static uint32_t compare(Compare how, T a, T b) {
    switch (how) {
    case EQ: return a == b;
    case NE: return a != b && !(a != a) && !(b != b);  // ordered: false for NaN
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    default: return a >= b;
    }
}

static uint64_t convert(uint64_t value, int from, int to, bool is_signed) {
    const int shift = 64 - from;
    const uint64_t whole = is_signed ? static_cast<uint64_t>(s64(value << shift) >> shift) : value << shift >> shift;
    return to == 64 ? whole : whole & ((1ull << to) - 1);
}

static uint32_t insert_bits(uint32_t bits, uint32_t into, uint32_t position, uint32_t length) {
    position &= 0xff, length &= 0xff;
    for (uint32_t n = 0; n < length && position + n < 32; ++n)
        into = (into & ~(1u << (position + n))) | (bits >> n & 1u) << (position + n);
    return into;
}

static uint32_t extract_bits(uint32_t value, uint32_t position, uint32_t length, bool is_signed) {
    position &= 0xff, length &= 0xff;
    const uint32_t last = std::min(position + length - 1, 31u);
    const uint32_t sign = is_signed && length ? value >> last & 1 : 0;
    uint32_t result = 0;
    for (uint32_t n = 0; n < 32; ++n)
        result |= (n < length && position + n < 32 ? value >> (position + n) & 1 : sign) << n;
    return result;
}

static uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int n = 0; n < 4; ++n) {
        const uint32_t choice = selector >> 4 * n;
        uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (choice & 7)) & 0xff;
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * n;
    }
    return result;
}

static uint32_t lookup(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int n = 0; n < 8; ++n)
        if (table >> n & 1) result |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    return result;
}

// Runs the statement for every lane of the mask.
#define LANES(...)                               \
    do {                                         \
        if (mask == 0xffffffffu) {               \
            for (int l = 0; l < 32; ++l) {       \
                __VA_ARGS__;                     \
            }                                    \
        } else {                                 \
            for (int l = 0; l < 32; ++l)         \
                if (mask >> l & 1) __VA_ARGS__;  \
        }                                        \
    } while (0)
#define DIVIDE(EXPRESSION)                                                    \
    LANES({                                                                   \
        if (B[l] == 0) error("division by zero", warp, l, i);                 \
        D[l] = B[l] == 0 ? 0xffffffffu : static_cast<uint32_t>(EXPRESSION);   \
    })

void Block::execute(Warp& warp, size_t pc, uint32_t mask) {
    const Instruction& i = kernel_.code[pc];
    if (kernel_.has_wgmma) check_registers(warp, i);
    // The lanes of each operand; only those of the width that the instruction reads are used.
    const auto narrow = [&](int r) { return r < 0 || r >= kernel_.narrow ? nullptr : &warp.narrow[r * 32]; };
    const auto wide = [&](int r) { return r < 0 || r >= kernel_.wide ? nullptr : &warp.wide[r * 32]; };
    uint32_t *const D = narrow(i.d), *const A = narrow(i.a), *const B = narrow(i.b), *const C = narrow(i.c);
    uint32_t* const E = narrow(i.e);
    uint64_t *const D6 = wide(i.d), *const A6 = wide(i.a), *const B6 = wide(i.b), *const C6 = wide(i.c);
    switch (i.op) {
    case MOV32: LANES(D[l] = A[l]); break;
    case MOV64: LANES(D6[l] = A6[l]); break;
    case PACK16: LANES(D[l] = (A[l] & 0xffff) | B[l] << 16); break;
    case UNPACK16: LANES({ const uint32_t v = A[l]; D[l] = v & 0xffff; E[l] = v >> 16; }); break;
    case PACK32: LANES(D6[l] = static_cast<uint64_t>(B[l]) << 32 | A[l]); break;
    case UNPACK32: LANES({ D[l] = u32(s64(A6[l])); E[l] = u32(s64(A6[l] >> 32)); }); break;
    case ADD16: LANES(D[l] = (A[l] + B[l]) & 0xffff); break;
    case ADD32: LANES(D[l] = A[l] + B[l]); break;
    case ADD64: LANES(D6[l] = A6[l] + B6[l]); break;
    case SUB16: LANES(D[l] = (A[l] - B[l]) & 0xffff); break;
    case SUB32: LANES(D[l] = A[l] - B[l]); break;
    case SUB64: LANES(D6[l] = A6[l] - B6[l]); break;
    case MUL16: LANES(D[l] = (A[l] * B[l]) & 0xffff); break;
    case MUL32: LANES(D[l] = A[l] * B[l]); break;
    case MUL64: LANES(D6[l] = A6[l] * B6[l]); break;
    case MULHIS: LANES(D[l] = u32(static_cast<int64_t>(s32(A[l])) * s32(B[l]) >> 32)); break;
    case MULHIU: LANES(D[l] = static_cast<uint32_t>(static_cast<uint64_t>(A[l]) * B[l] >> 32)); break;
    case MULWIDES: LANES(D6[l] = static_cast<uint64_t>(static_cast<int64_t>(s32(A[l])) * s32(B[l]))); break;
    case MULWIDEU: LANES(D6[l] = static_cast<uint64_t>(A[l]) * B[l]); break;
    case MULWIDES16: LANES(D[l] = u32(static_cast<int16_t>(A[l]) * static_cast<int16_t>(B[l]))); break;
    case MULWIDEU16: LANES(D[l] = (A[l] & 0xffff) * (B[l] & 0xffff)); break;
    case MAD32: LANES(D[l] = A[l] * B[l] + C[l]); break;
    case MAD64: LANES(D6[l] = A6[l] * B6[l] + C6[l]); break;
    case MADWIDES: LANES(D6[l] = static_cast<uint64_t>(static_cast<int64_t>(s32(A[l])) * s32(B[l])) + C6[l]); break;
    case MADWIDEU: LANES(D6[l] = static_cast<uint64_t>(A[l]) * B[l] + C6[l]); break;
    case DIVS: DIVIDE(s32(A[l]) / static_cast<int64_t>(s32(B[l]))); break;
    case DIVU: DIVIDE(A[l] / B[l]); break;
    case REMS: DIVIDE(s32(A[l]) % static_cast<int64_t>(s32(B[l]))); break;
    case REMU: DIVIDE(A[l] % B[l]); break;
    case MINS: LANES(D[l] = u32(std::min(s32(A[l]), s32(B[l])))); break;
    case MINU: LANES(D[l] = std::min(A[l], B[l])); break;
    case MAXS: LANES(D[l] = u32(std::max(s32(A[l]), s32(B[l])))); break;
    case MAXU: LANES(D[l] = std::max(A[l], B[l])); break;
    case NEG32: LANES(D[l] = 0u - A[l]); break;
    case ABS32: LANES(D[l] = s32(A[l]) < 0 ? 0u - A[l] : A[l]); break;
    case AND32: LANES(D[l] = A[l] & B[l]); break;
    case AND64: LANES(D6[l] = A6[l] & B6[l]); break;
    case OR32: LANES(D[l] = A[l] | B[l]); break;
    case OR64: LANES(D6[l] = A6[l] | B6[l]); break;
    case XOR32: LANES(D[l] = A[l] ^ B[l]); break;
    case XOR64: LANES(D6[l] = A6[l] ^ B6[l]); break;
    case NOT1: LANES(D[l] = !A[l]); break;
    case NOT32: LANES(D[l] = ~A[l]); break;
    case NOT64: LANES(D6[l] = ~A6[l]); break;
    case LOP3: LANES(D[l] = lookup(A[l], B[l], C[l], E[l])); break;
    case SHL16: LANES(D[l] = B[l] > 15 ? 0 : A[l] << B[l] & 0xffff); break;
    case SHL32: LANES(D[l] = B[l] > 31 ? 0 : A[l] << B[l]); break;
    case SHL64: LANES(D6[l] = B[l] > 63 ? 0 : A6[l] << B[l]); break;
    case SHRU16: LANES(D[l] = B[l] > 15 ? 0 : (A[l] & 0xffff) >> B[l]); break;
    case SHRU32: LANES(D[l] = B[l] > 31 ? 0 : A[l] >> B[l]); break;
    case SHRS32: LANES(D[l] = u32(s32(A[l]) >> std::min(B[l], 31u))); break;
    case SHRU64: LANES(D6[l] = B[l] > 63 ? 0 : A6[l] >> B[l]); break;
    case SHRS64: LANES(D6[l] = static_cast<uint64_t>(s64(A6[l]) >> std::min(B[l], 63u))); break;
    case BFI: LANES(D[l] = insert_bits(A[l], B[l], C[l], E[l])); break;
    case BFEU: LANES(D[l] = extract_bits(A[l], B[l], C[l], false)); break;
    case BFES: LANES(D[l] = extract_bits(A[l], B[l], C[l], true)); break;
    case PRMT: LANES(D[l] = permute(A[l], B[l], C[l])); break;
    case SELP32: LANES(D[l] = C[l] ? A[l] : B[l]); break;
    case SELP64: LANES(D6[l] = C[l] ? A6[l] : B6[l]); break;
    case SETP_S32:
    case SETP_U32:
    case SETP_F32:
    case SETP_S64:
    case SETP_U64:
        LANES({
            uint32_t is = i.op == SETP_S32   ? compare(i.compare, s32(A[l]), s32(B[l]))
                          : i.op == SETP_U32 ? compare(i.compare, A[l], B[l])
                          : i.op == SETP_F32 ? compare(i.compare, as_float(A[l]), as_float(B[l]))
                          : i.op == SETP_S64 ? compare(i.compare, s64(A6[l]), s64(B6[l]))
                                             : compare(i.compare, A6[l], B6[l]);
            uint32_t is_not = !is;
            if (i.combine == WITH_AND) is = is && C[l], is_not = is_not && C[l];
            if (i.combine == WITH_OR) is = is || C[l], is_not = is_not || C[l];
            if (i.combine == WITH_XOR) is ^= C[l], is_not ^= C[l];
            D[l] = is;
            for (int r : i.data) warp.narrow[r * 32 + l] = is_not;
        });
        break;
    case ADDF: LANES(D[l] = as_bits(as_float(A[l]) + as_float(B[l]))); break;
    case SUBF: LANES(D[l] = as_bits(as_float(A[l]) - as_float(B[l]))); break;
    case MULF: LANES(D[l] = as_bits(as_float(A[l]) * as_float(B[l]))); break;
    case FMA: LANES(D[l] = as_bits(std::fma(as_float(A[l]), as_float(B[l]), as_float(C[l])))); break;
    case FMA_DOWN: {
        const int before = fegetround();
        fesetround(FE_DOWNWARD);
        LANES({
            volatile float a = as_float(A[l]);
            volatile float sum = std::fma(a, as_float(B[l]), as_float(C[l]));
            D[l] = as_bits(sum);
        });
        fesetround(before);
        break;
    }
    case DIVF: LANES(D[l] = as_bits(as_float(A[l]) / as_float(B[l]))); break;
    case NEGF: LANES(D[l] = A[l] ^ 0x80000000u); break;
    case ABSF: LANES(D[l] = A[l] & 0x7fffffffu); break;
    case MINF: LANES(D[l] = as_bits(std::fmin(as_float(A[l]), as_float(B[l])))); break;
    case MAXF: LANES(D[l] = as_bits(std::fmax(as_float(A[l]), as_float(B[l])))); break;
    case EX2: LANES(D[l] = as_bits(std::exp2(as_float(A[l])))); break;
    case EX2_FTZ:
        LANES({
            const float v = std::exp2(as_float(A[l]));
            D[l] = as_bits(std::fabs(v) < 1.17549435e-38f ? 0.f : v);
        });
        break;
    case SATURATE: LANES(D[l] = as_bits(std::fmin(std::fmax(as_float(A[l]), 0.f), 1.f))); break;  // NaN: 0
    case CONVERT:
        LANES({
            const uint64_t v = convert(i.imm == 64 ? A6[l] : A[l], static_cast<int>(i.imm), i.width, i.is_signed);
            if (i.width == 64) D6[l] = v;
            else D[l] = static_cast<uint32_t>(v);
        });
        break;
    case CVT_F16_F32: LANES(D[l] = to_half(A[l])); break;
    case CVT_BF16_F32: LANES(D[l] = to_bfloat(A[l])); break;
    case CVT_F32_F16: LANES(D[l] = as_bits(half_to_float(A[l]))); break;
    case CVT_F32_BF16: LANES(D[l] = A[l] << 16); break;
    case CVT_F16X2_F32: LANES(D[l] = to_half(A[l]) << 16 | to_half(B[l])); break;
    case CVT_BF16X2_F32: LANES(D[l] = to_bfloat(A[l]) << 16 | to_bfloat(B[l])); break;
    case CVT_F32_S32: LANES(D[l] = as_bits(static_cast<float>(s32(A[l])))); break;
    case CVT_F32_U32: LANES(D[l] = as_bits(static_cast<float>(A[l]))); break;
    case CVT_S32_F32: LANES(D[l] = u32(static_cast<int64_t>(as_float(A[l])))); break;
    case LD_PARAM:
    case LD_GLOBAL:
    case LD_GLOBAL_NC:
    case ST_GLOBAL:
    case LD_SHARED:
    case ST_SHARED: LANES(access(warp, l, i)); break;
    case CP_ASYNC: LANES(copy(warp, l, i)); break;
    case CP_COMMIT: LANES(++warp.copy_group[l]); break;
    case CP_WAIT:
        LANES({
            const int64_t before = static_cast<int64_t>(warp.copy_group[l]) - i.imm;
            if (before > 0) finish_copies(warp, l, u32(before));
        });
        break;
    case FENCE_PROXY: LANES(warp.fences[l].push_back(warp.epoch)); break;
    case BAR_WARP: ++warp.syncs; break;
    case SHFL_BFLY:
    case SHFL_IDX:
    case SHFL_UP:
    case SHFL_DOWN: shuffle(warp, i); break;
    case LDMATRIX:
    case LDMATRIX_TRANS: load_matrix(warp, i); break;
    case MMA_F16:
    case MMA_BF16: multiply(warp, i); break;
    case WGMMA_FENCE: warp.fenced = warp.now; break;
    case WGMMA_F16:
    case WGMMA_BF16: issue_wgmma(warp, pc); break;
    case WGMMA_COMMIT: ++warp.product_group; break;
    case WGMMA_WAIT:
        if (const int64_t before = static_cast<int64_t>(warp.product_group) - i.imm; before > 0)
            finish_wgmma(warp, u32(before));
        break;
    case BAR_SYNC:
    case BRA:
    case RET: break;  // block.cpp
    }
}

// Nothing but wgmma touches the sums of a running wgmma.
void Block::check_registers(Warp& warp, const Instruction& i) {
    ++warp.now;
    if (warp.all_in_flight) {
        for (int r : i.reads)
            if (warp.in_flight[r]) error("sums of a running wgmma are read", warp, 0, i);
        for (int r : i.writes)
            if (warp.in_flight[r]) error("sums of a running wgmma are written", warp, 0, i);
    }
    for (int r : i.writes) warp.touched[r] = warp.now;
}

void Block::shuffle(Warp& warp, const Instruction& i) {
    uint32_t result[32], inside[32];
    for (int lane = 0; lane < 32; ++lane) {
        const auto value = [&](int r) { return s32(warp.narrow[r * 32 + lane]); };
        const int b = value(i.b) & 31, clamp = value(i.c) & 31, segment = value(i.c) >> 8 & 31;
        const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
        int from = i.op == SHFL_BFLY ? lane ^ b : i.op == SHFL_UP ? lane - b : i.op == SHFL_DOWN ? lane + b : b;
        if (i.op == SHFL_IDX) from = first | (b & ~segment);
        inside[lane] = i.op == SHFL_UP ? from >= last : from <= last;
        result[lane] = warp.narrow[i.a * 32 + (inside[lane] ? from : lane)];
    }
    for (int lane = 0; lane < 32; ++lane) {
        warp.narrow[i.d * 32 + lane] = result[lane];
        for (int r : i.data) warp.narrow[r * 32 + lane] = inside[lane];
    }
}

// Lanes 8 n to 8 n + 7 hold the addresses of the rows of matrix n.
void Block::load_matrix(Warp& warp, const Instruction& i) {
    const int count = static_cast<int>(i.data.size());
    uint16_t rows[4][8][8];
    memset(rows, 0xff, sizeof rows);
    for (int lane = 0; lane < 8 * count; ++lane) {
        uint32_t offset;
        const uint32_t address = warp.narrow[i.a * 32 + lane] + static_cast<uint32_t>(i.imm);
        if (!in_shared(warp, lane, i, address, 16, offset)) continue;
        check_read(warp, lane, i, offset, 16);
        memcpy(rows[lane / 8][lane % 8], &memory_[offset], 16);
    }
    for (int n = 0; n < count; ++n)
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const bool transposed = i.op == LDMATRIX_TRANS;
            const uint32_t low = transposed ? rows[n][t][g] : rows[n][g][t];
            const uint32_t high = transposed ? rows[n][t + 1][g] : rows[n][g][t + 1];
            warp.narrow[i.data[n] * 32 + lane] = low | high << 16;
        }
}

// mma m16n8k16: data has 4 registers of d, 4 of a, 2 of b and 4 of c.
void Block::multiply(Warp& warp, const Instruction& i) {
    float a[16][16], b[16][8], d[16][8];
    const auto number = [&](uint32_t bits) {
        return i.op == MMA_F16 ? half_to_float(bits) : bfloat_to_float(bits & 0xffff);
    };
    for (int lane = 0; lane < 32; ++lane) {
        const auto value = [&](int n) { return warp.narrow[i.data[n] * 32 + lane]; };
        const int g = lane / 4, t = lane % 4 * 2;
        for (int n = 0; n < 4; ++n) {
            const int row = g + n % 2 * 8, k = t + n / 2 * 8;
            a[row][k] = number(value(4 + n)), a[row][k + 1] = number(value(4 + n) >> 16);
        }
        for (int n = 0; n < 2; ++n) {
            const int k = t + n * 8;
            b[k][g] = number(value(8 + n)), b[k + 1][g] = number(value(8 + n) >> 16);
        }
        for (int n = 0; n < 4; ++n) d[g + n / 2 * 8][t + n % 2] = as_float(value(10 + n));
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[row][n] += a[row][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
        for (int n = 0; n < 4; ++n)
            warp.narrow[i.data[n] * 32 + lane] = as_bits(d[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2]);
}

}  // namespace ptx
