// The float16 kernels by emulated instructions, for CPUs without AVX512-FP16.
#define DSP_LANES 8
#define DSP_WIDE 1 // tiles for 32 registers, which this CPU spills
#define DSP_FP16 1
#define DSP_TABLE kernels_emulated_fp16
#include <immintrin.h>

#include "kernels/impl.h"
