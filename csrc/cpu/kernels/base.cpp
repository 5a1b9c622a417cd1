// For any CPU: 128-bit vectors (SSE2 on x86-64, NEON on arm64).
#define DSP_LANES 4
#if defined(__aarch64__)
#define DSP_WIDE 1
#else
#define DSP_WIDE 0
#endif
#define DSP_TABLE kernels_base
#include "impl.h"
