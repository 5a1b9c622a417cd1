// The functions of csrc/cpu/kernels/fp16.h for vectors of 8, emulated by F16C. A sum is rounded to float first, then to
// float16. Included inside namespace dsp.
#pragma once

inline V widen_lower(W words) {
    const __m256i lower = (__m256i)(words & 0xffffu);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
    return (V)_mm256_cvtph_ps(halves);
}

inline W narrow(V v) { return (W)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }

inline H multiply_add(H sum, H a, H b) {
    const V even = widen_lower(sum) + widen_lower(a) * widen_lower(b);
    const V odd = widen_lower(sum >> 16) + widen_lower(a >> 16) * widen_lower(b >> 16);
    return narrow(even) | narrow(odd) << 16;
}

inline V widen_sum(H h) { return widen_lower(h) + widen_lower(h >> 16); }
