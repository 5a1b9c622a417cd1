// For CPUs with AVX-512 F, DQ, BW and VL; setup.py compiles this file with those flags.
#if defined(__x86_64__)
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_TABLE kernels_avx512
#include "impl.h"
#endif
