// Implicit GEMM in CHWN: filters x (pixel, image) positions, the reduction flattened over (tap, channel).
// A block takes 128 positions: 16 chunks of 8 images, which are neighbours in every channel's plane. A row of the
// reduction is one channel at one tap: 16 gathered pieces of 16 bytes, so any channel set costs the same.
// taps: two numbers per row of the reduction: channel, dy << 16 | dx.
#pragma once

#include "warp_tile.cuh"

namespace dsp {

// The first tap of a chunk; a chunk behind the last one is placed outside every image.
struct ChwnColumn {
    int y, x, unit;
};

DSP_HD int output_chunks(const ConvSizes& p) { return p.out_height * p.out_width * (p.batch / 8); }

DSP_DEVICE ChwnColumn chwn_column(const ConvParams& p, int chunk) {
    const int n8 = p.batch / 8, pixel = chunk / n8, row = pixel / p.out_width;
    const int y = row * p.stride_y - p.pad_y, x = (pixel - row * p.out_width) * p.stride_x - p.pad_x;
    return {chunk < output_chunks(p) ? y : kOutside, x, chunk - pixel * n8 + (y * p.width + x) * n8};
}

// Copies this thread's part of block k of the reduction into its stage: weights, then K::kRows / (K::kThreads /
// K::kChunks) rows of its column, each to K::place(row, chunk).
template <class K>
DSP_DEVICE void load_block(const ConvParams& p, const Tile& tile, const ChwnColumn& column, int k) {
    const int thread = threadIdx.x, stage = k % K::kStages * K::kStageBytes;
    copy_weights<K::kWeightBytes, K::kThreads>(p, tile, k, stage);
    const int n8 = p.batch / 8, plane = p.height * p.width * n8;
    const int2* taps = reinterpret_cast<const int2*>(p.taps) + tile.taps + k * K::kRows;
#pragma unroll
    for (int row = thread / K::kChunks; row < K::kRows; row += K::kThreads / K::kChunks) {
        const int2 tap = __ldg(taps + row);
        const int dy = tap_y(tap.y), dx = tap_x(tap.y);
        const bool inside = is_inside(column.y + dy, column.x + dx, p.height, p.width);
        const int unit = inside ? column.unit + (dy * p.width + dx) * n8 + tap.x * plane : 0;
        cp_async_16(stage + K::kWeightBytes + K::place(row, thread % K::kChunks), static_cast<const uint4*>(p.x) + unit,
                    inside);
    }
}

template <int FILTERS>
struct ChwnGemm {
    static constexpr int kBlocks = 3;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = 128, kChunks = 16, kOutputs = kChunks * 8, kRows = 32, kStages = 4;
    static constexpr int kFilters = FILTERS, kMT = FILTERS / 16, kNT = 4;  // of a warp
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kRowBytes = kChunks * 16;
    static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static int shared_bytes(int) { return std::max(kStages * kStageBytes, kSumBytes); }
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    // Chunks of a row are permuted by the row's number, so that ldmatrix finds eight rows of one chunk in all banks.
    DSP_HD static int place(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) * 16); }
};

template <class T, int FILTERS>
__global__ void __launch_bounds__(ChwnGemm<FILTERS>::kThreads, ChwnGemm<FILTERS>::kBlocks)
    chwn_gemm(const __grid_constant__ ConvParams p) {
    using K = ChwnGemm<FILTERS>;
    const int block = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int tile_number = block % p.tile_count;
    const int chunk = block / p.tile_count * K::kChunks + thread % K::kChunks;
    const Tile tile = p.tiles[tile_number];
    const ChwnColumn column = chwn_column(p, chunk);

    float sums[K::kMT][K::kNT][4] = {};
    const auto load = [&](int k) { load_block<K>(p, tile, column, k); };
    each_block<K::kStages>(tile.k_blocks, load, [&](int k) {
        const int stage = k % K::kStages * K::kStageBytes;
#pragma unroll
        for (int step = 0; step < K::kRows / 16; ++step)
            multiply_step<T, true>(sums, stage, step, [&](int pair) {
                return stage + K::kWeightBytes + K::place(step * 16 + lane % 16, warp * K::kNT + pair * 2 + lane / 16);
            });
    });
    __syncthreads();
    store_by_filter(sums, warp * K::kNT * 8, K::kSumStride);
    __syncthreads();
    const int chunks = output_chunks(p);
    if (chunk < chunks) finish_chunk<T, K>(p, tile_number, chunks, chunk);
}

}  // namespace dsp
