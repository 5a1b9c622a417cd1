// Launches a kernel template on a stream of the current device and checks every step.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "gpu_machine.cuh"
#include "launch.h"

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

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks) block_kernel(const __grid_constant__ BlockParams p) {
    extern __shared__ __align__(1024) char memory[];
    GpuMachine machine(memory);
    K::run(machine, p, static_cast<int>(blockIdx.x));
}

inline void check_cuda(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// The most bytes of shared memory of one block.
inline int64_t shared_limit(int device) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "querying the shared memory of a block");
    return bytes;
}

// Of one kernel: on which devices it was granted the most shared memory.
using Granted = std::atomic<bool>[64];

// `what`: the kernel and its sizes, for an error's message.
template <class Params, class Plan>
void launch_kernel(void (*kernel)(Params), Granted& granted, const Plan& plan, int device, cudaStream_t stream,
                   const std::string& what) {
    if (plan.blocks > std::numeric_limits<int>::max()) throw std::runtime_error(what + ": too many blocks");
    if (plan.blocks == 0) return;
    // More than 48 KB must be requested once per kernel and device; it is a setting, not work on a stream.
    if (plan.shared_bytes > 48 * 1024 && (device >= 64 || !granted[device].load())) {
        const int most = static_cast<int>(shared_limit(device));
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                   what + ", requesting " + std::to_string(most) + " bytes of shared memory");
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

template <class K>
void launch_block(const BlockLaunch& plan, int device, cudaStream_t stream, const std::string& what) {
    static Granted granted;
    launch_kernel(block_kernel<K>, granted, plan, device, stream, what);
}

// Instantiated for each 16-bit type by a source file of its own.
template <class T>
void run_16bit(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what) {
    dispatch_16bit<T>(sizes, params, shared_limit(device), [&](auto kernel, const Launch& plan) {
        launch<decltype(kernel)>(plan, device, static_cast<cudaStream_t>(stream), what);
    });
}

template <class T>
void run_wgmma(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what) {
    dispatch_wgmma<T>(sizes, params, shared_limit(device), [&](auto kernel, const Launch& plan) {
        launch<decltype(kernel), WarpgroupMachine>(plan, device, static_cast<cudaStream_t>(stream), what);
    });
}

template <class T>
void run_block(const BlockSizes& sizes, const BlockLaunch& plan, int device, void* stream, const std::string& what) {
    dispatch_block<T>(sizes.filters, plan, [&](auto kernel, const BlockLaunch& launch) {
        launch_block<decltype(kernel)>(launch, device, static_cast<cudaStream_t>(stream), what);
    });
}

}  // namespace dsp
