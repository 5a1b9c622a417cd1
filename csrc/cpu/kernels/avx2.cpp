// For CPUs with AVX2 and FMA; setup.py compiles this file with -mavx2 -mfma.
#if defined(__x86_64__)
#define DSP_LANES 8
#define DSP_WIDE 0
#define DSP_TABLE kernels_avx2
#include "impl.h"
#endif
