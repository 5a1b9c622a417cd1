// The kernels of AMX, where every convolution with words is computed by matrices: by emulated instructions, or with
// DSP_REAL_AMX by those of the CPU.
#ifndef DSP_REAL_AMX
#define DSP_EMULATED_AMX
#endif
#define DSP_MATRIX_PRICE 1e-6
#define DSP_LANES 16
#define DSP_WIDE 1
#define DSP_AMX 1
#define DSP_TABLE kernels_emulated_amx
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/impl.h"
