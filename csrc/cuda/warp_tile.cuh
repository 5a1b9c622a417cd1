// Shared by the kernels: the reduction of a tile block after block through a ring of stages in shared memory, a k16
// step of a warp's tile on tensor cores, and its sums through shared memory into the output. Fragment layouts of
// mma.m16n8k16: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". Offsets in shared memory are in
// bytes.
#pragma once

#include <algorithm>

#include "params.h"
#include "ptx.cuh"

namespace dsp {

// Where a tap reads: outside the image zeros stand in for it.
DSP_DEVICE int tap_y(int packed) { return packed >> 16; }
DSP_DEVICE int tap_x(int packed) { return packed & 0xffff; }
DSP_DEVICE bool is_inside(int y, int x, int height, int width) {
    return static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(width);
}

template <int COUNT, class F>
DSP_DEVICE void apply(float (&value)[COUNT], F f) {
#pragma unroll
    for (float& v : value) v = f(v);
}
DSP_DEVICE float clamp6(float v) { return v < 0.f ? 0.f : (v > 6.f ? 6.f : v); }

// In place, with one branch for all values.
template <int COUNT>
DSP_DEVICE void activate(float (&value)[COUNT], int kind) {
    switch (static_cast<Activation>(kind)) {
        case Activation::none:
            return;
        case Activation::relu:
            return apply(value, [](float v) { return v < 0.f ? 0.f : v; });
        case Activation::relu6:
            return apply(value, clamp6);
        case Activation::silu:
            return apply(value, [](float v) { return v / (1.f + expf(-v)); });
        case Activation::hardswish:
            return apply(value, [](float v) { return v * (clamp6(v + 3.f) / 6.f); });
    }
}

// Copies this thread's part of the weights of one block, which are contiguous, to the beginning of its stage.
template <int BYTES, int THREADS>
DSP_DEVICE void copy_weights(const ConvParams& p, const Tile& tile, int k_block, int stage) {
    constexpr int kUnits = BYTES / 16;
    const int thread = threadIdx.x;
    const uint4* weights = static_cast<const uint4*>(p.weights) + tile.weights + k_block * kUnits;
#pragma unroll
    for (int first = 0; first < kUnits; first += THREADS)
        if (first + THREADS <= kUnits || first + thread < kUnits)
            cp_async_16(stage + (first + thread) * 16, weights + first + thread);
}

// load(k) starts to copy block k into its stage while multiply() processes the blocks before it.
template <int STAGES, class Load, class Multiply>
DSP_DEVICE void each_block(int k_blocks, Load load, Multiply multiply) {
    constexpr int kAhead = STAGES - 1;
    for (int k = 0; k < kAhead; ++k) {
        if (k < k_blocks) load(k);
        cp_async_commit();
    }
    for (int k = 0; k < k_blocks; ++k) {
        cp_async_wait<kAhead - 1>();
        __syncthreads();
        if (k + kAhead < k_blocks) load(k + kAhead);
        cp_async_commit();
        multiply(k);
    }
    cp_async_wait<0>();
}

// The sums of a warp: MT * 16 filters by NT * 8 positions, += the fragments `a` of one step times its positions.
// at(pair of n tiles): the offset of this lane's row of eight values, for ldmatrix.x4: lanes 0-7 and 8-15 the k halves
// of the first n tile, 16-23 and 24-31 those of the second.
template <class T, bool TRANSPOSED, int MT, int NT, class Offset>
DSP_DEVICE void multiply_fragments(float (&sums)[MT][NT][4], const uint4 (&a)[MT], Offset at) {
#pragma unroll
    for (int j = 0; j < NT / 2; ++j) {
        const uint4 b = ldmatrix_x4<TRANSPOSED>(at(j));
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            mma_m16n8k16<T>(sums[i][2 * j], a[i], b.x, b.y);
            mma_m16n8k16<T>(sums[i][2 * j + 1], a[i], b.z, b.w);
        }
    }
}

// The same with the fragments of step number `step` in shared memory from `weights` on: [m tile][lane][8 values], so a
// lane reads 16 bytes.
template <class T, bool TRANSPOSED, int MT, int NT, class Offset>
DSP_DEVICE void multiply_step(float (&sums)[MT][NT][4], int weights, int step, Offset at) {
    const int lane = threadIdx.x % 32;
    uint4 a[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i)
        a[i] = *reinterpret_cast<const uint4*>(shared_memory + weights + ((step * MT + i) * 32 + lane) * 16);
    multiply_fragments<T, TRANSPOSED>(sums, a, at);
}

// Stores sums as float [filter][position], rows of `stride` floats; stride % 32 == 8 avoids bank conflicts.
template <int MT, int NT>
DSP_DEVICE void store_by_filter(const float (&sums)[MT][NT][4], int first_position, int stride, int first_filter = 0) {
    float* shared = reinterpret_cast<float*>(shared_memory);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int filter = first_filter + i * 16 + half * 8 + lane / 4;
                const int position = first_position + j * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(shared + filter * stride + position) =
                    make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
}

// Eight neighbouring sums. Half of a quarter warp reads its upper four first, so that eight lanes with 32 bytes each
// use every bank once per access.
DSP_DEVICE void load_eight(int offset, bool swapped, float (&value)[8]) {
    const int toggle = swapped ? 16 : 0;
    const float4 first = *reinterpret_cast<const float4*>(shared_memory + offset + toggle);
    const float4 second = *reinterpret_cast<const float4*>(shared_memory + offset + (16 - toggle));
    const float4 low = swapped ? second : first, high = swapped ? first : second;
    value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
    value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
}

template <class T>
DSP_DEVICE void add_eight(float (&value)[8], uint4 packed) {
    const uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] += to_float<T>(static_cast<uint16_t>(word[i / 2] >> i % 2 * 16));
}

// Residual and activation of eight sums that are adjacent in memory, and their one store.
template <class T>
DSP_DEVICE void finish_eight(const ConvParams& p, float (&value)[8], int64_t unit) {
    if (p.residual) add_eight<T>(value, static_cast<const uint4*>(p.residual)[unit]);
    activate(value, p.activation);
    static_cast<uint4*>(p.out)[unit] = pack_eight<T>(value);
}

// CHWN: the sums of store_by_filter at chunk threadIdx % K::kChunks of 8 images, filters from threadIdx / K::kChunks
// on. plane: chunks of an output channel; unit: which of them it is.
template <class T, class K>
DSP_DEVICE void finish_chunk(const ConvParams& p, int tile_number, int plane, int unit) {
    const int thread = threadIdx.x, chunk = thread % K::kChunks;
#pragma unroll
    for (int filter = thread / K::kChunks; filter < K::kFilters; filter += K::kThreads / K::kChunks) {
        const int row = tile_number * K::kFilters + filter;
        const int channel = __ldg(p.rows + row);
        if (channel < 0) continue;
        float value[8];
        load_eight((filter * K::kSumStride + chunk * 8) * 4, chunk & 4, value);
        const float bias = __ldg(p.bias + row);
#pragma unroll
        for (float& v : value) v += bias;
        finish_eight<T>(p, value, static_cast<int64_t>(channel) * plane + unit);
    }
}

}  // namespace dsp
