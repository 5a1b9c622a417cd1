#include "mma_kernels.cuh"

void dsp::add_float16_kernels(Kernels& all) { add_mma_kernels<__half>(all, Dtype::float16); }
