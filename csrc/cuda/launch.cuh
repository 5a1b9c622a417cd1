// Launching a kernel template on a stream of the current device, with every step checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "launch_plan.h"
#include "gpu_machine.cuh"

namespace dsp {

// MACHINE: GpuMachine, or one with more instructions.
template <class K, class MACHINE>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks) conv_kernel(const __grid_constant__ ConvParams p) {
    extern __shared__ __align__(1024) char memory[];
    if constexpr (MACHINE::can_run) {
        MACHINE machine(memory);
        K::run(machine, p, static_cast<int>(blockIdx.x));
    }
}

inline void check_cuda(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// Bytes of shared memory that one block may have.
inline int64_t shared_limit(int device) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "asking for the shared memory of a block");
    return bytes;
}

// Of one kernel: on which devices it may have all the shared memory that a block can have.
using Granted = std::atomic<bool>[64];

// `what`: the kernel and its sizes, for an error's message.
template <class Params, class Plan>
void launch_kernel(void (*kernel)(Params), Granted& granted, const Plan& plan, int device, cudaStream_t stream,
                   const std::string& what) {
    if (plan.blocks > std::numeric_limits<int>::max()) throw std::runtime_error(what + ": too many blocks");
    if (plan.blocks == 0) return;
    // More than 48 KB has to be asked for, once per kernel and device; it is a setting, not work on a stream.
    if (plan.shared_bytes > 48 * 1024 && (device >= 64 || !granted[device].load())) {
        const int most = static_cast<int>(shared_limit(device));
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                   what + ", asking for " + std::to_string(most) + " bytes of shared memory");
        if (device < 64) granted[device].store(true);
    }
    kernel<<<static_cast<unsigned>(plan.blocks), plan.threads, plan.shared_bytes, stream>>>(plan.params);
    check_cuda(cudaGetLastError(), what);
}

template <class K, class MACHINE = GpuMachine>
void launch(const Launch& plan, int device, cudaStream_t stream, const std::string& what) {
    static Granted granted;
    launch_kernel(conv_kernel<K, MACHINE>, granted, plan, device, stream, what);
}

}  // namespace dsp
