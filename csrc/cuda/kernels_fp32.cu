#include "fp32_gemm.cuh"
#include "kernels.cuh"

void dsp::add_float32_kernels(Kernels& all) {
    all.convs.push_back(gemm_kernel<Fp32Gemm<false>>(Kernel::fp32_chwn, Dtype::float32, "rows", fp32_gemm<false>));
    all.convs.push_back(gemm_kernel<Fp32Gemm<true>>(Kernel::fp32_nhwc, Dtype::float32, "rows", fp32_gemm<true>));
}
