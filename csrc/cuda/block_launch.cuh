// Launching one block kernel, with every step checked.
#pragma once

#include "../common/block_plan.h"
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
    if (plan.blocks > std::numeric_limits<int>::max()) throw std::runtime_error(what + ": too many blocks");
    if (plan.blocks == 0) return;
    static std::atomic<bool> granted[64];
    if (plan.shared_bytes > 48 * 1024 && (device >= 64 || !granted[device].load())) {
        const int most = static_cast<int>(shared_limit(device));
        check_cuda(cudaFuncSetAttribute(block_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                   what + ", asking for " + std::to_string(most) + " bytes of shared memory");
        if (device < 64) granted[device].store(true);
    }
    block_kernel<K><<<static_cast<unsigned>(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(plan.params);
    check_cuda(cudaGetLastError(), what);
}

}  // namespace dsp
