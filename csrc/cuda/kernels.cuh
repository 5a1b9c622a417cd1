// The table of kernels. Each kernels_*.cu adds those of one type, so that they compile side by side.
#pragma once

#include <vector>

#include "params.h"

namespace dsp {

struct ConvKernel {
    Kernel kernel;
    Dtype dtype;
    const char* weight_order;  // see WEIGHT_ORDERS in run/gpu/cuda/groups.py
    void (*function)(ConvParams);
    int filters, threads;
    int outputs;  // of a thread block: pixels x images
    int rows;     // of the reduction in a block of it
    // Of a thread block; halo: chunks of the tile of a halo kernel with its halo.
    int (*shared_bytes)(int halo);
    // Halo kernels: whether a tile of height x width pixels x chunks fits.
    bool (*fits)(int height, int width, int chunks);
};

struct BlockKernel {
    Dtype dtype;
    void (*function)(BlockParams);
    int filters, threads;
};

struct Kernels {
    std::vector<ConvKernel> convs;
    std::vector<BlockKernel> blocks;
};

// K: the constants of a kernel.
template <class K>
ConvKernel gemm_kernel(Kernel kernel, Dtype dtype, const char* order, void (*function)(ConvParams)) {
    return {kernel, dtype, order, function, K::kFilters, K::kThreads, K::kOutputs, K::kRows, K::shared_bytes, nullptr};
}
template <class K>
ConvKernel halo_kernel(Kernel kernel, Dtype dtype, const char* order, void (*function)(ConvParams)) {
    ConvKernel made = gemm_kernel<K>(kernel, dtype, order, function);
    made.fits = K::fits;
    return made;
}

void add_float16_kernels(Kernels& all);
void add_bfloat16_kernels(Kernels& all);
void add_float32_kernels(Kernels& all);
void add_wgmma_kernels(Kernels& all);

}  // namespace dsp
