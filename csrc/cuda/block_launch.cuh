// Launching one block kernel, with every step checked.
#pragma once

#include "block_plan.h"
#include "launch.cuh"

namespace dsp {

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks) block_kernel(const __grid_constant__ BlockParams p) {
    extern __shared__ __align__(1024) char memory[];
    GpuMachine machine(memory);
    K::run(machine, p, static_cast<int>(blockIdx.x));
}

template <class K>
void launch_block(const BlockLaunch& plan, int device, cudaStream_t stream, const std::string& what) {
    static Granted granted;
    launch_kernel(block_kernel<K>, granted, plan, device, stream, what);
}

}  // namespace dsp
