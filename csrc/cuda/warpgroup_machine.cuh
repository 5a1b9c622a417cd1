// A GPU's warpgroups (sm_90a): wgmma on operands in shared memory. Names and arguments are those of the emulation on
// the host (tests/cuda_emulated/emulator/host_machine.h). Compiled for another chip a kernel that
// needs them is empty, and Python chooses none there.
#pragma once

#include "warpgroup_tile.h"
#include "gpu_machine.cuh"

namespace dsp {

// One wgmma: 64 filters x 128 positions x 16. TYPE: f16 or bf16; a, b: descriptors; the last number of the
// instruction says that b lies along mn.
#define DSP_FOUR(j) "+f"(s[j].value[0]), "+f"(s[j].value[1]), "+f"(s[j].value[2]), "+f"(s[j].value[3])
#define DSP_WGMMA(TYPE)                                                                                               \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"\
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                  \
                 "%64, %65, p, 1, 1, 0, 1; }"                                                                         \
                 : DSP_FOUR(0), DSP_FOUR(1), DSP_FOUR(2), DSP_FOUR(3),                                                \
                   DSP_FOUR(4), DSP_FOUR(5), DSP_FOUR(6), DSP_FOUR(7),                                                \
                   DSP_FOUR(8), DSP_FOUR(9), DSP_FOUR(10), DSP_FOUR(11),                                              \
                   DSP_FOUR(12), DSP_FOUR(13), DSP_FOUR(14), DSP_FOUR(15)                                             \
                 : "l"(a), "l"(b)                                                                                     \
                 : "memory")

struct WarpgroupMachine : GpuMachine {
    using GpuMachine::GpuMachine;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static constexpr bool can_run = true;
#else
    static constexpr bool can_run = false;
#endif

    template <class F>
    __device__ __forceinline__ void each_warpgroup(F f) {
        f(static_cast<int>(threadIdx.x) / 128);
    }

    // What this thread wrote to shared memory becomes visible to wgmma, which reads it by another way.
    __device__ __forceinline__ void publish() {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    // Before the first product after a change of its sums.
    __device__ __forceinline__ void begin_products() {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    }
    __device__ __forceinline__ void commit_products() {
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    // Until at most so many groups of products are under way. After 0 the sums may be read.
    template <int GROUPS, class S>
    __device__ __forceinline__ void wait_products(S&) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
    }

    // sums += a * b: 64 filters x 16 of the warpgroup `group`, 16 x 128 positions. a along k, b along mn.
    template <class T, class S, class A, class B>
    __device__ __forceinline__ void multiply_warpgroup(S& sums, int, const A& left, const B& right) {
        static_assert(A::order == Order::along_k && B::order != Order::along_k, "the instruction's two last numbers");
        Acc(&s)[16] = sums[0].at[0];
        const uint64_t a = descriptor_of(left, shared_address), b = descriptor_of(right, shared_address);
        if constexpr (T::is_half)
            DSP_WGMMA("f16");
        else
            DSP_WGMMA("bf16");
    }
};

}  // namespace dsp
