// For CPUs with AVX-512 FP16, which also have AVX-512 BF16. setup.py defines DSP_HAS_AVX512_FP16 if the compiler
// supports it.
#if defined(__x86_64__) && defined(DSP_HAS_AVX512_FP16)
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_BF16 1
#define DSP_VNNI 1
#define DSP_FP16 1
#define DSP_TABLE kernels_avx512_fp16
#include "impl.h"
#endif
