#include "mma_kernels.cuh"

void dsp::add_bfloat16_kernels(Kernels& all) { add_mma_kernels<__nv_bfloat16>(all, Dtype::bfloat16); }
