// The machine that a kernel template runs on: one thread of a GPU, sm_80 or newer. Names and arguments are those of
// the emulation on the host (tests/cuda_emulated/emulator/host_machine.h).
#pragma once

#include "wgmma.h"

namespace dsp {

#define DSP_LDMATRIX(TRANSPOSED)                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANSPOSED ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])             \
                 : "r"(row)                                                                       \
                 : "memory")
#define DSP_MMA(TYPE)                                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
                 : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[first]), \
                   "r"(b.word[first + 1]))

struct GpuMachine {
    static constexpr bool can_run = true;  // compiled for this chip
    // Registers of this thread; the emulation has one for every thread or warp.
    template <class V>
    struct PerThread {
        V value;
        DSP_FN V& operator[](int) { return value; }
    };
    template <class V>
    using PerWarp = PerThread<V>;
    template <class V>
    using PerLane = PerThread<V>;

    using Quad = Vec16;
    struct Acc {
        float value[4];
    };

    char* shared;
    uint32_t shared_address;

    DSP_FN static Vec16 as_vec16(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }

    DSP_FN explicit GpuMachine(char* memory)
        : shared(memory), shared_address(static_cast<uint32_t>(__cvta_generic_to_shared(memory))) {}

    template <class F>
    DSP_FN void each_thread(F f) {
        f(static_cast<int>(threadIdx.x));
    }
    template <class F>
    DSP_FN void each_warp(F f) {
        f(static_cast<int>(threadIdx.x) / 32);
    }
    template <class F>
    DSP_FN void each_lane(int, F f) {
        f(static_cast<int>(threadIdx.x) % 32);
    }
    DSP_FN void sync() { __syncthreads(); }

    // Sixteen bytes of global memory into shared memory, or zeros where not `inside`.
    DSP_FN void copy16(int, int offset, const Vec16* source, bool inside) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address + offset),
                     "l"(__cvta_generic_to_global(source)), "r"(inside ? 16 : 0)
                     : "memory");
    }
    DSP_FN void copy4(int, int offset, const float* source, bool inside) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address + offset),
                     "l"(__cvta_generic_to_global(source)), "r"(inside ? 4 : 0)
                     : "memory");
    }
    DSP_FN void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    template <int GROUPS>
    DSP_FN void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
    }

    // Memory that is constant while the kernel runs.
    template <class V>
    DSP_FN V read(const V* source) {
        return __ldg(source);
    }
    DSP_FN Pair read(const Pair* source) {
        const int2 both = __ldg(reinterpret_cast<const int2*>(source));
        return {both.x, both.y};
    }
    DSP_FN Vec16 read(const Vec16* source) { return as_vec16(__ldg(reinterpret_cast<const uint4*>(source))); }
    // The residual may be the output.
    template <class V>
    DSP_FN V read_residual(const V* source) {
        return *source;
    }
    DSP_FN Vec16 read_residual(const Vec16* source) { return as_vec16(*reinterpret_cast<const uint4*>(source)); }
    template <class V>
    DSP_FN void write(V* target, V value) {
        *target = value;
    }
    DSP_FN void write(Vec16* target, const Vec16& v) {
        *reinterpret_cast<uint4*>(target) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
    }

    DSP_FN void store_one(int, int offset, float v) { *reinterpret_cast<float*>(shared + offset) = v; }
    DSP_FN void store_two(int, int offset, float a, float b) {
        *reinterpret_cast<float2*>(shared + offset) = make_float2(a, b);
    }
    DSP_FN void store16(int, int offset, const Vec16& v) { write(reinterpret_cast<Vec16*>(shared + offset), v); }
    DSP_FN void store_word(int, int offset, uint32_t v) { *reinterpret_cast<uint32_t*>(shared + offset) = v; }
    DSP_FN Vec16 load16(int, int offset) { return as_vec16(*reinterpret_cast<const uint4*>(shared + offset)); }
    DSP_FN void load_four(int, int offset, float (&v)[4]) {
        const float4 all = *reinterpret_cast<const float4*>(shared + offset);
        v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    }
    template <class Address>
    DSP_FN void load_fragment(int, Quad& q, Address at) {
        q = load16(0, at(static_cast<int>(threadIdx.x) % 32));
    }
    // The same from constant global memory: 32 lanes read 16 bytes each from `base` on.
    DSP_FN void read_fragment(int, Quad& q, const Vec16* base) { q = read(base + threadIdx.x % 32); }
    // Reconverges the lanes, as ldmatrix and mma require.
    DSP_FN void converge() { __syncwarp(); }
    // Every lane gets the value of the lane whose number differs in `bit`.
    DSP_FN void exchange(int, PerLane<float>& v, int bit) { v.value = __shfl_xor_sync(0xffffffffu, v.value, bit); }
    template <bool TRANSPOSED, class Address>
    DSP_FN void load_matrices(int, Quad& q, Address at) {
        const uint32_t row = shared_address + at(static_cast<int>(threadIdx.x) % 32);
        if (TRANSPOSED)
            DSP_LDMATRIX(".trans");
        else
            DSP_LDMATRIX("");
    }
    // acc += a * b, where b is two words of a quad from `first` on.
    template <class T>
    DSP_FN void multiply(Acc& acc, const Quad& a, const Quad& b, int first) {
        float (&d)[4] = acc.value;
        if (T::is_half)
            DSP_MMA("f16");
        else
            DSP_MMA("bf16");
    }
    DSP_FN static void clear(Acc& acc) { acc.value[0] = acc.value[1] = acc.value[2] = acc.value[3] = 0.f; }
    DSP_FN static float get(const Acc& acc, int element, int) { return acc.value[element]; }
    DSP_FN static float as_float(uint32_t word) { return __uint_as_float(word); }
    DSP_FN static uint32_t as_word(float value) { return __float_as_uint(value); }
};

// With the warpgroups of sm_90a: wgmma on operands in shared memory. For other architectures a kernel that needs them
// compiles to nothing, and Python never chooses it there.
//
// One wgmma: 64 filters x 128 positions x 16. TYPE: f16 or bf16; a, b: descriptors; the last number of the
// instruction says that b is along mn.
#define DSP_FOUR(j) "+f"(s[j].value[0]), "+f"(s[j].value[1]), "+f"(s[j].value[2]), "+f"(s[j].value[3])
#define DSP_WGMMA(TYPE)                                                                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
                 " {"                                                                                              \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "               \
                 "%64, %65, p, 1, 1, 0, 1; }"                                                                      \
                 : DSP_FOUR(0), DSP_FOUR(1), DSP_FOUR(2), DSP_FOUR(3), DSP_FOUR(4), DSP_FOUR(5), DSP_FOUR(6),      \
                   DSP_FOUR(7), DSP_FOUR(8), DSP_FOUR(9), DSP_FOUR(10), DSP_FOUR(11), DSP_FOUR(12), DSP_FOUR(13),  \
                   DSP_FOUR(14), DSP_FOUR(15)                                                                      \
                 : "l"(a), "l"(b)                                                                                  \
                 : "memory")

struct WarpgroupMachine : GpuMachine {
    using GpuMachine::GpuMachine;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static constexpr bool can_run = true;
#else
    static constexpr bool can_run = false;
#endif

    template <class F>
    DSP_FN void each_warpgroup(F f) {
        f(static_cast<int>(threadIdx.x) / 128);
    }

    // Makes this thread's writes to shared memory visible to wgmma, which reads through another proxy.
    DSP_FN void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

    // Before the first product after a change of its sums.
    DSP_FN void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
    DSP_FN void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
    // Waits until at most this many groups of products are in flight. After 0 the sums may be read.
    template <int GROUPS, class S>
    DSP_FN void wait_products(S&) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
    }

    // sums += a * b: 64 filters x 16 of the warpgroup `group`, 16 x 128 positions. a along k, b along mn.
    template <class T, class S, class A, class B>
    DSP_FN void multiply_warpgroup(S& sums, int, const A& left, const B& right) {
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
