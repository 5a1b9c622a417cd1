// The kernels of AMX by emulated instructions, for CPUs with AVX-512 only.
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_AMX 1
#define DSP_TABLE kernels_emulated_amx
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/impl.h"
