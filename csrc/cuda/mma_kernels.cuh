// The kernels of one 16-bit type that run from sm_80 on.
#pragma once

#include "block_kernel.cuh"
#include "chwn_gemm.cuh"
#include "halo_conv.cuh"
#include "kernels.cuh"
#include "nhwc_gemm.cuh"

namespace dsp {

template <class T, int FILTERS>
void add_mma_kernels_of(Kernels& all, Dtype dtype) {
    constexpr auto order = "fragments";
    const auto add = [&](const ConvKernel& kernel) { all.convs.push_back(kernel); };
    add(gemm_kernel<ChwnGemm<FILTERS>>(Kernel::chwn, dtype, order, chwn_gemm<T, FILTERS>));
    add(halo_kernel<HaloConv<FILTERS>>(Kernel::halo, dtype, order, halo_conv<T, FILTERS>));
    if constexpr (FILTERS <= 32) {
        add(gemm_kernel<NhwcGemm<FILTERS, 1>>(Kernel::nhwc, dtype, order, nhwc_gemm<T, FILTERS, 1>));
        add(gemm_kernel<NhwcGemm<FILTERS, 4>>(Kernel::nhwc_sliced, dtype, order, nhwc_gemm<T, FILTERS, 4>));
        all.blocks.push_back({dtype, fused_block<T, FILTERS>, FILTERS, FusedBlock<FILTERS>::kThreads});
    }
}

template <class T>
void add_mma_kernels(Kernels& all, Dtype dtype) {
    add_mma_kernels_of<T, 16>(all, dtype);
    add_mma_kernels_of<T, 32>(all, dtype);
    add_mma_kernels_of<T, 64>(all, dtype);
}

}  // namespace dsp
