// For CPUs that also have AVX-512 BF16, all of which have VNNI. setup.py defines DSP_HAS_AVX512_BF16 if the compiler
// supports it.
#if defined(__x86_64__) && defined(DSP_HAS_AVX512_BF16)
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_BF16 1
#define DSP_VNNI 1
#define DSP_TABLE kernels_avx512_bf16
#include "impl.h"
#endif
