#include "kernels.cuh"
#include "wgmma.cuh"

namespace dsp {

template <class T>
void add_kernels(Kernels& all, Dtype dtype) {
    all.convs.push_back(gemm_kernel<WgmmaGemm<64>>(Kernel::wgmma, dtype, "cores", wgmma_gemm<T, 64>));
    all.convs.push_back(gemm_kernel<WgmmaGemm<128>>(Kernel::wgmma, dtype, "cores", wgmma_gemm<T, 128>));
    all.convs.push_back(halo_kernel<WgmmaHalo>(Kernel::wgmma_halo, dtype, "cores", wgmma_halo<T>));
}

void add_wgmma_kernels(Kernels& all) {
    add_kernels<__half>(all, Dtype::float16);
    add_kernels<__nv_bfloat16>(all, Dtype::bfloat16);
}

}  // namespace dsp
