// For CPUs with AMX for bytes and bfloat16, all of which have AVX-512 FP16. setup.py defines DSP_HAS_AVX512_AMX if the
// compiler supports it.
#if defined(__x86_64__) && defined(DSP_HAS_AVX512_AMX) && defined(DSP_HAS_AVX512_FP16)
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_BF16 1
#define DSP_VNNI 1
#define DSP_FP16 1
#define DSP_AMX 1
#define DSP_TABLE kernels_avx512_amx
#include "impl.h"
#endif
