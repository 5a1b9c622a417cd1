// The kernels for any vector length. Before including this, the source file of an instruction set defines DSP_LANES
// (floats per vector), DSP_WIDE (1 with 32 vector registers), DSP_TABLE, and DSP_BF16, DSP_FP16, DSP_VNNI and DSP_AMX
// to 1 if it has multiply-add instructions for these types and for bytes, and products of matrices.
// Everything is in an anonymous namespace and no header with inline functions is included: the linker must not pick
// code compiled for a newer instruction set than the CPU has.
#pragma once

#include "kernel.h"

#if defined(__AVX512F__)
#include <immintrin.h> // its functions are always inlined and emit no symbols
#endif

#ifndef DSP_BF16
#define DSP_BF16 0
#endif
#ifndef DSP_FP16
#define DSP_FP16 0
#endif
#ifndef DSP_VNNI
#define DSP_VNNI 0
#endif
#ifndef DSP_AMX
#define DSP_AMX 0
#endif

namespace dsp {
namespace {

// A loop of constant length, unrolled so that the arrays that it indexes stay in registers.
#define UNROLLED(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; ++i)

constexpr int L = DSP_LANES;
typedef float V __attribute__((vector_size(L * 4)));
typedef int32_t M __attribute__((vector_size(L * 4)));
typedef float VU __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t MU __attribute__((vector_size(L * 4), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
inline V keep(V v, const int32_t* mask) { return (V)((M)v & *reinterpret_cast<const MU*>(mask)); }
// A NaN stays a NaN: the comparison is false and v is returned.
inline V at_least(V v, float low) { return V{} + low > v ? V{} + low : v; }
inline V at_most(V v, float high) { return V{} + high < v ? V{} + high : v; }

// A product that is rounded before it is added to something: the compiler may not make a fused multiply-add of it.
inline V separate(V product) {
#if defined(__x86_64__)
    asm("" : "+v"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#else
    asm("" : "+m"(product));
#endif
    return product;
}

// The end of an integer step, from exact integers.
struct Requantizer {
    const V residual, low, high, rounds;
    explicit Requantizer(const Ending& e)
        : residual(V{} + e.residual), low(V{} + e.low), high(V{} + e.high),
          rounds(V{} + (e.round ? 12582912.0f : 0.0f)) {} // adding 1.5 * 2^23 rounds to an integer
    V scaled(V sum, V multiplier, V bias) const { return separate(sum * multiplier) + bias; }
    V added(V t, const float* add) const { return t + separate(load(add) * residual); }
    V ended(V t) const { // a NaN stays
#if defined(__AVX512F__)
        t = (V)_mm512_maskz_min_ps(0xffff, (__m512)high, _mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)t));
#else
        t = low > t ? low : t;
        t = high < t ? high : t;
#endif
        return t + rounds - rounds;
    }
};

// exp by 2^n * polynomial (Cephes' expf coefficients); error below 2 ulp on the clamped range.
inline V exponential(V x) {
    x = at_most(at_least(x, -87.3f), 88.0f);
    V shifted = x * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer
    V n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    M power = ((M)shifted - (M)(V{} + 12582912.0f) + 127) << 23;
    return p * (V)power;
}

// x times the normal distribution, by Abramowitz and Stegun 7.1.26: the error of erf is below 1.5e-7.
inline V gelu(V x) {
    const V z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    const V p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const V tail = x * (0.5f * p * exponential(-z * z));
    return x < 0.0f ? tail : x - tail;
}

inline V hyperbolic_tangent(V x) {
    const V size = x < 0.0f ? -x : x, square = x * x, t = exponential(-2.0f * size);
    // Near zero the difference below loses all digits: Taylor's series.
    const V near = (((62.0f / 2835 * square - 17.0f / 315) * square + 2.0f / 15) * square - 1.0f / 3) * square * x + x;
    const V far = (1.0f - t) / (1.0f + t);
    return size < 0.3f ? near : x < 0.0f ? -far : far;
}

inline V activate(V v, Act act) {
    switch (act) {
    case Act::relu: return at_least(v, 0.0f);
    case Act::relu6: return at_most(at_least(v, 0.0f), 6.0f);
    // Below -88 the exponential is clamped: the result is zero, and NaN for -inf, as in PyTorch.
    case Act::silu: return v < -88.0f ? v * 0.0f : v / (1.0f + exponential(-v));
    case Act::hardswish: return v * at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case Act::sigmoid: return 1.0f / (1.0f + exponential(-v));
    case Act::hardsigmoid: return at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case Act::gelu: return v < -30.0f ? v * 0.0f : gelu(v);
    case Act::gelu_tanh:
        return v < -30.0f ? v * 0.0f : v / (1.0f + exponential(v * (-1.59576912f - 0.07135481f * v * v)));
    case Act::tanh: return hyperbolic_tangent(v);
    default: return v;
    }
}

__attribute__((noinline)) void activate_plane(float* y, const int32_t* vec, int vectors, Act act) {
    for (int p = 0; p < vectors; ++p) store(y + vec[p], activate(load(y + vec[p]), act));
}

// One term of the sums of a tile: P vectors times K weights.
template <int K, int P>
inline __attribute__((always_inline)) void multiply_add(V (&acc)[K][P], const V (&in)[P], const float* w) {
    // Scalar times vector compiles to a broadcast load; a broadcast vector would cost a shuffle.
    UNROLLED(k, K) UNROLLED(p, P) acc[k][p] += w[k] * in[p];
}

// Calls add(displacement, its K weights) for the terms of a sum.
template <int K, typename Add>
inline __attribute__((always_inline)) void each_term(const int32_t* off, int64_t count, const float* w,
                                                     const Add& add) {
    const int32_t* const end = off + count;
    // Three at a time: the branch predictor learns the end of a shorter loop.
    for (; end - off >= 3; off += 3, w += 3 * K) add(off[0], w), add(off[1], w + K), add(off[2], w + 2 * K);
    for (; off != end; ++off, w += K) add(off[0], w);
}

template <int K, int P>
inline __attribute__((always_inline)) void add_term(V (&acc)[K][P], const float* const (&x)[P], int64_t o,
                                                    const float* w) {
    V in[P];
    UNROLLED(p, P) in[p] = load(x[p] + o);
    multiply_add<K, P>(acc, in, w);
}

// The bounds to which a tile's activation clamps; infinite bounds cost less than branches.
struct Bounds {
    V low, high;
    explicit Bounds(Act act) {
        const float infinite = __builtin_inff();
        low = V{} + (act == Act::relu || act == Act::relu6 ? 0.0f : -infinite);
        high = V{} + (act == Act::relu6 ? 6.0f : infinite);
    }
    V operator()(V v) const { // a NaN passes both
        v = low > v ? low : v;
        return high < v ? high : v;
    }
};

// SiLU and hardswish are costly: inside every tile they would bloat the code, so they run after it.
inline bool is_late(Act act) { return act == Act::silu || act == Act::hardswish; }

// Bias, residual, activation and the store of a tile.
template <int K, int P, bool masked>
inline __attribute__((always_inline)) void finish(V (&acc)[K][P], const TileCall& call) {
    const bool late = is_late(call.act);
    const Bounds bounds(call.act);
    int64_t at[P];
    UNROLLED(p, P) at[p] = call.vec[p];
    float* const base = call.y;
    const float* const bias = call.bias;
    const float* const add = call.add;
    const int64_t* const y_plane = call.y_plane;
    const int64_t* const add_plane = call.add_plane;
    const int32_t* const mask = call.mask;
    UNROLLED(k, K) {
        float* y = base + y_plane[k];
        if (bias) {
            UNROLLED(p, P) acc[k][p] += bias[k];
        }
        if (add) {
            const float* plane = add + add_plane[k];
            UNROLLED(p, P) acc[k][p] += load(plane + at[p]);
        }
        UNROLLED(p, P) {
            V v = bounds(acc[k][p]);
            if (masked) v = keep(v, mask + p * L);
            store(y + at[p], v);
        }
        if (late) activate_plane(y, call.vec, P, call.act);
    }
}

// The end of an integer tile.
template <int K, int P, bool masked>
inline __attribute__((always_inline)) void finish_integers(M (&sum)[K][P], const TileCall& call) {
    const Requantizer to(*call.ending);
    int64_t at[P];
    UNROLLED(p, P) at[p] = call.vec[p];
    float* const base = call.y;
    const float *const bias = call.bias, *const multiplier = call.multiplier, *const add = call.add;
    const int64_t *const y_plane = call.y_plane, *const add_plane = call.add_plane;
    const int32_t* const mask = call.mask;
    UNROLLED(k, K) {
        float* const y = base + y_plane[k];
        const V factor = V{} + multiplier[k], shift = V{} + bias[k];
        V t[P];
        UNROLLED(p, P) t[p] = to.scaled(__builtin_convertvector(sum[k][p], V), factor, shift);
        if (add) {
            const float* const plane = add + add_plane[k];
            UNROLLED(p, P) t[p] = to.added(t[p], plane + at[p]);
        }
        UNROLLED(p, P) {
            const V v = to.ended(t[p]);
            store(y + at[p], masked ? keep(v, mask + p * L) : v);
        }
    }
}

// The same after a pass of its sums: they go on in memory, or end.
template <int K, int P>
inline __attribute__((always_inline)) void pass_integers(M (&sum)[K][P], const TileCall& call) {
    MU* const held = reinterpret_cast<MU*>(call.sums);
    if (!call.begins) UNROLLED(k, K) UNROLLED(p, P) sum[k][p] += held[k * P + p];
    if (!call.ends) {
        UNROLLED(k, K) UNROLLED(p, P) held[k * P + p] = sum[k][p];
        return;
    }
    call.mask ? finish_integers<K, P, true>(sum, call) : finish_integers<K, P, false>(sum, call);
}

// From exact sums in float. Not in the tile, where it would cost registers.
template <int K, int P>
__attribute__((noinline)) void pass_exact(const V* pass, const TileCall& call) {
    M sum[K][P];
    UNROLLED(k, K) UNROLLED(p, P) sum[k][p] = __builtin_convertvector(pass[k * P + p], M);
    pass_integers(sum, call);
}

// A tile; add() adds the term of one displacement, floats or words.
template <int K, int P, void (*add)(V (&)[K][P], const float* const (&)[P], int64_t, const float*)>
void tile(const TileCall& call) {
    V acc[K][P];
    UNROLLED(k, K)
        UNROLLED(p, P) acc[k][p] = V{};
    const float* x[P];
    UNROLLED(p, P) x[p] = call.x + call.vec[p];
    each_term<K>(call.off, call.count, call.w,
                 [&](int64_t off, const float* w) __attribute__((always_inline)) { add(acc, x, off, w); });
    if (call.ending) {
        V pass[K * P];
        UNROLLED(k, K) UNROLLED(p, P) pass[k * P + p] = acc[k][p];
        return pass_exact<K, P>(pass, call);
    }
    call.mask ? finish<K, P, true>(acc, call) : finish<K, P, false>(acc, call);
}

} // namespace
} // namespace dsp

#include "bands.h"
#include "maps.h"
#include "bf16.h"
#if DSP_FP16
#include "fp16.h"
#endif
#if DSP_VNNI || DSP_AMX
#include "int8.h"
#endif
#if DSP_AMX
#include "amx.h"
#endif

namespace dsp {
namespace {

// Most vectors of a microtile of 1, 2, 3, ... filters: its sums, the loaded vectors and one broadcast weight fit the
// registers.
#if DSP_WIDE
constexpr int widths[] = {8, 8, 8, 6, 5, 4, 3, 3};
#else
constexpr int widths[] = {6, 5, 3, 3, 2, 2};
#endif

// Microtiles of K filters and P or fewer vectors, and those of fewer filters.
template <int K, int P = widths[K - 1]>
void fill(Kernels& table) {
    table.vectors[K] = widths[K - 1];
    table.tile[K][P] = tile<K, P, add_term<K, P>>;
    table.band_tile[K][P] = band_tile<K, P>;
    table.bf16.tile[K][P] = tile<K, P, add_pairs<K, P>>;
#if DSP_FP16
    table.fp16.tile[K][P] = half_tile<K, P>;
#endif
#if DSP_VNNI
    table.quads[0].tile[K][P] = table.quads[1].tile[K][P] = quad_tile<K, P>;
#endif
    if constexpr (P > 1)
        fill<K, P - 1>(table);
    else if constexpr (K > 1)
        fill<K - 1>(table);
}

Kernels make() {
    Kernels table{};
    table.lanes = L;
    table.map = map;
    table.norm = norm;
    table.pool = pool;
    table.linear = linear;
    table.thin = thin;
    table.band_input[0] = band_input;
    table.band_input[1] = patch_input;
    table.band_input[2] = stacked_input;
    // Latency measured on Zen 5, the time of a product on Sapphire Rapids.
    table.bf16 = {DSP_BF16 || DSP_AMX, 2, 0, 6.0, {}, pack_words<2, pack_pair>, 2.0, {}};
#if DSP_FP16
    table.fp16 = {true, 2, 0, 4.0, {}, pack_words<2, pack_halves>, 1.0, {}}; // like float multiply-adds; not measured
#endif
#if DSP_VNNI || DSP_AMX
    table.quads[0] = {true, 4, 0, 4.0, {}, pack_words<4, pack_quad<false>>, 1.0, {}};
    table.quads[1] = {true, 4, 0x80, 4.0, {}, pack_words<4, pack_quad<true>>, 1.0, {}};
#endif
#if DSP_AMX
    table.matrices = {matrix_price, begin_matrices, end_matrices, gather_matrices};
    fill_matrices<false>(table.bf16);
    for (WordKernels& quads : table.quads) fill_matrices<true>(quads);
#endif
    table.filters = sizeof(widths) / sizeof(int);
    fill<sizeof(widths) / sizeof(int)>(table);
    return table;
}

} // namespace

const Kernels& DSP_TABLE() {
    static const Kernels table = make();
    return table;
}

} // namespace dsp
