// Integer convolutions by AVX512-VNNI, included by impl.h. A 32-bit word holds one pixel of four channels as unsigned
// bytes, the first in the lowest. One instruction adds the products of a word and four signed weights to an int32 sum.
// A value with sign is stored plus 128; then a sum begins with -128 times the sum of its weights.
#pragma once

namespace dsp {
namespace {

template <bool is_signed>
inline V pack_quad(const V (&channels)[4]) {
    __m512i v[4]; // without a mask GCC warns of uninitialized values
    UNROLLED(c, 4) v[c] = _mm512_maskz_cvtps_epi32(0xffff, (__m512)channels[c]);
    const __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
    // In every 128 bits, 4 pixels of each channel.
    const __m512i bytes = is_signed ? _mm512_xor_si512(_mm512_packs_epi16(low, high), _mm512_set1_epi8(-128))
                                    : _mm512_packus_epi16(low, high);
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (V)_mm512_shuffle_epi8(bytes, _mm512_maskz_broadcast_i32x4(0xffff, order));
}

#if DSP_VNNI
template <int K, int P>
void quad_tile(const TileCall& call) {
    M acc[K][P];
    UNROLLED(k, K) UNROLLED(p, P) acc[k][p] = M{} + (call.begins ? call.start[k] : 0);
    const float* x[P];
    UNROLLED(p, P) x[p] = call.x + call.vec[p];
    each_term<K>(call.off, call.count, call.w, [&](int64_t o, const float* w) __attribute__((always_inline)) {
        M in[P];
        UNROLLED(p, P) in[p] = (M)load(x[p] + o);
        UNROLLED(k, K) {
            const __m512i weight = (__m512i)_mm512_set1_ps(w[k]);
            UNROLLED(p, P) acc[k][p] = (M)_mm512_dpbusd_epi32((__m512i)acc[k][p], (__m512i)in[p], weight);
        }
    });
    pass_integers(acc, call);
}
#endif

} // namespace
} // namespace dsp
