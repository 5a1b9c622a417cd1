// The kernels are templates over the machine that runs them: a GPU's thread, or the emulation of a whole block of
// threads on the host (tests/cuda_emulated/emulator). These names stand for what the two compilers call differently.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DSP_FN __device__ __forceinline__
#define DSP_HD __host__ __device__ __forceinline__
#else
#define DSP_FN inline
#define DSP_HD inline
#endif

namespace dsp {

// What one 16-byte access moves.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

struct alignas(8) Pair {
    int first, second;
};

}  // namespace dsp
