// The PTX instructions that CUDA C++ has no function for, one wrapper each. Addresses in shared memory are 32-bit, as
// the instructions take them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define DSP_DEVICE __device__ __forceinline__

namespace dsp {

// The dynamic shared memory of every kernel. 1,024: the atoms of wgmma's 128-byte swizzle.
extern __shared__ __align__(1024) char shared_memory[];

DSP_DEVICE uint32_t shared_address(int offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
}

// Copies global memory into shared memory from `offset` on, or writes zeros where not `inside`.
DSP_DEVICE void cp_async_16(int offset, const void* source, bool inside = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(offset)),
                 "l"(__cvta_generic_to_global(source)), "r"(inside ? 16 : 0)
                 : "memory");
}
DSP_DEVICE void cp_async_4(int offset, const void* source, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(offset)),
                 "l"(__cvta_generic_to_global(source)), "r"(inside ? 4 : 0)
                 : "memory");
}
DSP_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most this many groups are in flight.
template <int GROUPS>
DSP_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane i gives the row i % 8 of matrix i / 8.
#define DSP_LDMATRIX(TRANSPOSED)                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANSPOSED ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)                                     \
                 : "r"(shared_address(offset))                                                    \
                 : "memory")
template <bool TRANSPOSED>
DSP_DEVICE uint4 ldmatrix_x4(int offset) {
    uint4 q;
    if constexpr (TRANSPOSED)
        DSP_LDMATRIX(".trans");
    else
        DSP_LDMATRIX("");
    return q;
}

// d += a * b: 16 x 16 by 16 x 8.
#define DSP_MMA(TYPE)                                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])             \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b_low), "r"(b_high))
template <class T>
DSP_DEVICE void mma_m16n8k16(float (&d)[4], const uint4& a, uint32_t b_low, uint32_t b_high) {
    if constexpr (std::is_same_v<T, __half>)
        DSP_MMA("f16");
    else
        DSP_MMA("bf16");
}

// Makes this thread's writes to shared memory visible to wgmma, which reads through another proxy.
DSP_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product after a change of its sums.
DSP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DSP_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most this many groups of products are in flight; after 0 the sums may be read.
template <int GROUPS>
DSP_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// d += a * b: 64 x 16 by 16 x 128, both read from shared memory through descriptors, a along k and b along n (the last
// two numbers of the instruction).
#define DSP_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
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
template <class T>
DSP_DEVICE void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b) {
    if constexpr (std::is_same_v<T, __half>)
        DSP_WGMMA("f16");
    else
        DSP_WGMMA("bf16");
}

// Two 16-bit numbers in one register.
template <class T>
DSP_DEVICE uint32_t pack_two(float low, float high) {
    const T pair[2] = {T(low), T(high)};
    return *reinterpret_cast<const uint32_t*>(pair);
}
template <class T>
DSP_DEVICE uint4 pack_eight(const float (&v)[8]) {
    return make_uint4(pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]),
                      pack_two<T>(v[6], v[7]));
}
template <class T>
DSP_DEVICE float to_float(uint16_t bits) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(bits));
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

}  // namespace dsp
