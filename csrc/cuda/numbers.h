// Types and 16-bit formats for the GPU and for the emulation on the host (tests/cuda_emulated/emulator): the kernels
// are templates over the machine that runs them, a thread of a GPU or a whole block of threads on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DSP_FN __device__ __forceinline__
#define DSP_HD __host__ __device__ __forceinline__
#else
#define DSP_FN inline
#define DSP_HD inline
#endif

namespace dsp {

// One 16-byte access.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

struct alignas(8) Pair {
    int first, second;
};

template <class To, class From>
To reinterpret(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct Half {
    static constexpr bool is_half = true;
    DSP_FN static float widen(uint16_t bits) {
#ifdef __CUDACC__
        return __half2float(__ushort_as_half(bits));
#else
        return static_cast<float>(reinterpret<_Float16>(bits));
#endif
    }
    DSP_FN static uint16_t narrow(float value) {
#ifdef __CUDACC__
        return __half_as_ushort(__float2half_rn(value));
#else
        return reinterpret<uint16_t>(static_cast<_Float16>(value));
#endif
    }
};

struct Bfloat {
    static constexpr bool is_half = false;
    DSP_FN static float widen(uint16_t bits) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
#ifdef __CUDACC__
        return __uint_as_float(wide);
#else
        return reinterpret<float>(wide);
#endif
    }
    DSP_FN static uint16_t narrow(float value) {
#ifdef __CUDACC__
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
        const uint32_t wide = reinterpret<uint32_t>(value);
        if ((wide & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the NaN that the GPU gives
        return static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
#endif
    }
};

template <class T>
DSP_FN void add_eight(float (&value)[8], const Vec16& packed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        value[2 * i] += T::widen(static_cast<uint16_t>(packed.word[i]));
        value[2 * i + 1] += T::widen(static_cast<uint16_t>(packed.word[i] >> 16));
    }
}

template <class T>
DSP_FN Vec16 narrow_eight(const float (&value)[8]) {
    Vec16 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        packed.word[i] =
            static_cast<uint32_t>(T::narrow(value[2 * i])) | static_cast<uint32_t>(T::narrow(value[2 * i + 1])) << 16;
    return packed;
}

}  // namespace dsp
