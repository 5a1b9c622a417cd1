// Convolutions in float16, included by impl.h for CPUs with AVX512-FP16. A 32-bit word holds one pixel of two channels,
// the first in the lower half, as in bf16.h. One instruction multiplies a vector of words by a word of weights and adds
// to sums in float16: of even channels in the lower halves, of odd ones in the upper.
//
// Such a sum is rounded to 11 bits at every term, so it is added to a float sum after at most half_terms terms. With
// n = half_terms and terms of random signs, the root mean square error of a sum is 2^-11 * sqrt(n / 6) times its
// typical size, whatever its length; tolerances.py derives its bound from n. Products and sums of n terms beyond the
// range of float16 (65504) become infinite, and anything below 2^-25 underflows.
#pragma once

namespace dsp {
namespace {

typedef W H; // two halves per word

#if defined(__AVX512FP16__)

constexpr __mmask16 all = 0xffff; // without a mask GCC warns of uninitialized values

// By assembly: GCC 12 also uses the other two forms, which costs moves and spills, 16 in a loop of 72 multiply-adds.
inline H multiply_add(H sum, H a, H b) {
    asm("vfmadd231ph %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// The nearest float16, ties to even, in the lower half of each word; infinite beyond its range. A NaN stays a NaN.
inline W narrow(V v) {
    const __m256i halves = _mm512_maskz_cvtps_ph(all, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    return (W)_mm512_maskz_cvtepu16_epi32(all, halves);
}

// The sum of both halves of each word.
inline V widen_sum(H h) {
    typedef int16_t I __attribute__((vector_size(64)));
    constexpr I order{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                      1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i sorted = _mm512_permutexvar_epi16((__m512i)order, (__m512i)h);
    const __m256i even = _mm512_maskz_extracti64x4_epi64(0xff, sorted, 0),
                  odd = _mm512_maskz_extracti64x4_epi64(0xff, sorted, 1);
    return (V)_mm512_maskz_cvtph_ps(all, even) + (V)_mm512_maskz_cvtph_ps(all, odd);
}

#else
#include "emulated_fp16.h" // in tests/helpers
#endif

inline V pack_halves(const V (&channels)[2]) { return (V)(narrow(channels[0]) | narrow(channels[1]) << 16); }

// One term of a tile's sums: P vectors of words times K weights, two products each. The fewer of the two stay in
// registers.
template <int K, int P>
inline __attribute__((always_inline)) void add_halves(H (&acc)[K][P], const float* const (&x)[P], int64_t o,
                                                      const float* w) {
    const Word* words = reinterpret_cast<const Word*>(w);
    if constexpr (K < P) {
        H weight[K];
        UNROLLED(k, K) weight[k] = (H)(W{} + words[k]);
        UNROLLED(p, P) {
            const H in = (H)load(x[p] + o);
            UNROLLED(k, K) acc[k][p] = multiply_add(acc[k][p], in, weight[k]);
        }
    } else {
        H in[P];
        UNROLLED(p, P) in[p] = (H)load(x[p] + o);
        UNROLLED(k, K) {
            const H weight = (H)(W{} + words[k]);
            UNROLLED(p, P) acc[k][p] = multiply_add(acc[k][p], in[p], weight);
        }
    }
}

// Sums a tile in runs of about equal length; the float sums stay in memory, because those in float16 fill the
// registers.
template <int K, int P>
void half_tile(const TileCall& call) {
    alignas(L * 4) float sums[K * P * L];
    const float* x[P];
    UNROLLED(p, P) x[p] = call.x + call.vec[p];
    const float* w = call.w;
    const int32_t* off = call.off;
    int64_t left = call.count, run = left;
    if (left > half_terms) {
        const int64_t runs = (left + half_terms - 1) / half_terms;
        run = (left + runs - 1) / runs;
    }
    V total[K][P];
    for (bool first = true;; first = false) {
        if (left < run) run = left;
        H acc[K][P];
        UNROLLED(k, K) UNROLLED(p, P) acc[k][p] = H{};
        each_term<K>(off, run, w, [&](int64_t o, const float* weights)
                                      __attribute__((always_inline)) { add_halves(acc, x, o, weights); });
        off += run, w += run * K;
        UNROLLED(k, K) UNROLLED(p, P) {
            total[k][p] = widen_sum(acc[k][p]);
            if (!first) total[k][p] += load(sums + (k * P + p) * L);
        }
        if (!(left -= run)) break;
        UNROLLED(k, K) UNROLLED(p, P) store(sums + (k * P + p) * L, total[k][p]);
    }
    call.mask ? finish<K, P, true>(total, call) : finish<K, P, false>(total, call);
}

} // namespace
} // namespace dsp
