// For CPUs that also have AVX-512 VNNI. setup.py defines DSP_HAS_AVX512_VNNI if the compiler supports it.
#if defined(__x86_64__) && defined(DSP_HAS_AVX512_VNNI)
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_VNNI 1
#define DSP_TABLE kernels_avx512_vnni
#include "impl.h"
#endif
