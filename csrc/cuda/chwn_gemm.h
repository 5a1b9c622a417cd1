// Implicit GEMM in CHWN: filters x (pixel, image) positions, the reduction flattened over (tap, channel).
// A block takes 128 positions: 16 chunks of 8 images, which are neighbours in every channel's plane. A row of the
// reduction is one channel at one tap: 16 gathered pieces of 16 bytes, so any channel set costs the same.
// taps: one Pair per row of the reduction: {channel, dy << 16 | dx}.
#pragma once

#include "warp_tile.h"

namespace dsp {

// The first tap of a chunk; a chunk behind the last one is placed outside every image.
struct ChwnColumn {
    int y, x, unit;
};

DSP_HD int output_chunks(const ConvParams& p) { return p.out_height * p.out_width * (p.batch / 8); }

DSP_FN ChwnColumn chwn_column(const ConvParams& p, int chunk) {
    const int n8 = p.batch / 8, pixel = chunk / n8, row = pixel / p.out_width;
    const int y = row * p.stride_y - p.pad_y, x = (pixel - row * p.out_width) * p.stride_x - p.pad_x;
    return {chunk < output_chunks(p) ? y : kOutside, x, chunk - pixel * n8 + (y * p.width + x) * n8};
}

// Copies `thread`'s part of one block of the reduction: K::kRows / (K::kThreads / K::kChunks) rows of its column, each
// to K::place(row, chunk) from `target` on.
template <class K, class M>
DSP_FN void gather_rows(M& m, const ConvParams& p, const Tile& tile, int k_block, int thread, const ChwnColumn& c,
                        int target) {
    const int n8 = p.batch / 8, plane = p.height * p.width * n8;
    const Pair* taps = reinterpret_cast<const Pair*>(p.taps) + tile.taps + k_block * K::kRows;
#pragma unroll
    for (int row = thread / K::kChunks; row < K::kRows; row += K::kThreads / K::kChunks) {
        const Pair tap = m.read(taps + row);
        const int dy = tap_y(tap.second), dx = tap_x(tap.second);
        const bool inside = is_inside(c.y + dy, c.x + dx, p.height, p.width);
        const int unit = inside ? c.unit + (dy * p.width + dx) * n8 + tap.first * plane : 0;
        m.copy16(thread, target + K::place(row, thread % K::kChunks), static_cast<const Vec16*>(p.x) + unit, inside);
    }
}

// Block k of the reduction into its stage: the weights, then the rows.
template <class K, class M, class Columns>
DSP_FN void load_block(M& m, const ConvParams& p, const Tile& tile, Columns& columns, int k) {
    const int stage = k % K::kStages * K::kStageBytes;
    m.each_thread([&](int thread) {
        copy_weights<K::kWeightBytes, K::kThreads>(m, p, tile, k, thread, stage);
        gather_rows<K>(m, p, tile, k, thread, columns[thread], stage + K::kWeightBytes);
    });
}

template <class T, int FILTERS>
struct ChwnGemm {
    static constexpr int kBlocks = 3;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = 128, kChunks = 16, kRows = 32, kStages = 4;
    static constexpr int kFilters = FILTERS, kMT = FILTERS / 16, kNT = 4;  // of a warp
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kRowBytes = kChunks * 16;
    static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    // Chunks of a row are permuted by the row's number, so that ldmatrix finds eight rows of one chunk in all banks.
    DSP_HD static int place(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) * 16); }

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const int tile_number = block % p.tile_count;
        const int first_chunk = block / p.tile_count * kChunks;
        const Tile tile = p.tiles[tile_number];

        typename M::template PerThread<ChwnColumn> columns;
        m.each_thread([&](int thread) { columns[thread] = chwn_column(p, first_chunk + thread % kChunks); });
        const auto load = [&](int k) { load_block<ChwnGemm>(m, p, tile, columns, k); };

        typename M::template PerWarp<Sums<M, kMT, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        each_block<kStages>(m, tile.k_blocks, load, [&](int k) {
            const int stage = k % kStages * kStageBytes;
            m.each_warp([&](int warp) {
#pragma unroll
                for (int step = 0; step < kRows / 16; ++step)
                    multiply_step<T, true>(m, warp, sums[warp], stage, step, [&](int pair, int lane) {
                        return stage + kWeightBytes + place(step * 16 + lane % 16, warp * kNT + pair * 2 + lane / 16);
                    });
            });
        });
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], warp * kNT * 8, kSumStride); });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = first_chunk + thread % kChunks, chunks = output_chunks(p);
            if (chunk < chunks) finish_chunk<T, ChwnGemm>(m, p, thread, tile_number, chunks, chunk);
        });
    }
};

}  // namespace dsp
