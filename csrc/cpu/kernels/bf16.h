// Convolutions in bfloat16, included by impl.h. A 32-bit word holds one pixel of two channels, the first in the lower
// half; a vector holds `lanes` words. Two products are added to a float sum at a time: by one instruction where the CPU
// has it (DSP_BF16), otherwise as two float products, which round in another order. The instruction treats denormal
// numbers as 0.
#pragma once

namespace dsp {
namespace {

typedef uint32_t W __attribute__((vector_size(L * 4)));
typedef uint32_t Word __attribute__((may_alias));

constexpr uint32_t upper_half = 0xffff0000u;

// The nearest bfloat16, ties to even, in the upper half of each word. A NaN stays a NaN.
inline W round_upper(V v) {
    const W bits = (W)v;
    const W rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (v == v ? rounded : bits | 0x400000u) & upper_half;
}

inline V pack_pair(const V (&channels)[2]) {
    const V a = channels[0], b = channels[1];
#if DSP_BF16
    // All of a, then all of b, as 16-bit numbers; then interleaved pixel by pixel.
    typedef int16_t H __attribute__((vector_size(64)));
    constexpr H order{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (V)_mm512_permutexvar_epi16((__m512i)order, both);
#else
    return (V)(round_upper(a) >> 16 | round_upper(b));
#endif
}

// One term of a tile's sums: P vectors of words times K weights, two products each.
template <int K, int P>
inline __attribute__((always_inline)) void add_pairs(V (&acc)[K][P], const float* const (&x)[P], int64_t o,
                                                     const float* w) {
    V in[P];
#if DSP_BF16
    UNROLLED(p, P) in[p] = load(x[p] + o);
    UNROLLED(k, K) {
        const __m512bh weight = (__m512bh)_mm512_set1_ps(w[k]);
        UNROLLED(p, P) acc[k][p] = (V)_mm512_dpbf16_ps((__m512)acc[k][p], (__m512bh)in[p], weight);
    }
#else
    // All lower halves, then all upper ones: needs no more registers than float.
    UNROLLED(half, 2) {
        UNROLLED(p, P) {
            const W words = (W)load(x[p] + o);
            in[p] = half ? (V)(words & upper_half) : (V)(words << 16);
        }
        UNROLLED(k, K) {
            const W words = W{} + reinterpret_cast<const Word*>(w)[k];
            const V weight = half ? (V)(words & upper_half) : (V)(words << 16);
            UNROLLED(p, P) acc[k][p] += weight * in[p];
        }
    }
#endif
}

// One row of words from rows of N channels.
template <int N, V (*pack)(const V (&)[N])>
void pack_row(const float* const (&rows)[N], float* target, int64_t count) {
    V in[N];
    int64_t n = 0;
    for (; n + L <= count; n += L) {
        UNROLLED(c, N) in[c] = rows[c] ? load(rows[c] + n) : V{};
        store(target + n, pack(in));
    }
    if (n == count) return;
    float rest[N + 1][L] = {};
    for (int c = 0; c < N; ++c)
        for (int64_t i = n; i < count; ++i) rest[c][i - n] = rows[c] ? rows[c][i] : 0.0f;
    UNROLLED(c, N) in[c] = load(rest[c]);
    store(rest[N], pack(in));
    for (int64_t i = n; i < count; ++i) target[i] = rest[N][i - n];
}

template <int N, V (*pack)(const V (&)[N])>
void pack_words(const float* const* planes, float* target, int64_t count, int64_t stride, int images) {
    const float* rows[N];
    for (int c = 0; c < N; ++c) rows[c] = planes[c];
    if (stride == 1) return pack_row<N, pack>(rows, target, count * images);
    float thinned[N][256]; // images divides its length
    const int64_t piece = 256 / images;
    for (int64_t n = 0; n < count; n += piece) {
        const int64_t some = count - n < piece ? count - n : piece;
        for (int c = 0; c < N; ++c) {
            if (!planes[c]) continue;
            thin({planes[c] + n * stride * images, thinned[c], 1, 0, 0, some, stride, images});
            rows[c] = thinned[c];
        }
        pack_row<N, pack>(rows, target + n * images, some * images);
    }
}

} // namespace
} // namespace dsp
