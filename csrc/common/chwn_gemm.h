// Implicit GEMM in CHWN: filters x (pixel, image) positions, the reduction flattened over (tap, channel).
// A block takes 128 positions: 16 chunks of 8 images, which are neighbours in every channel's plane. A row of the
// reduction is one channel at one tap: 16 gathered pieces of 16 bytes, so any channel set costs the same.
// taps: one Pair per row of the reduction: {channel, dy << 16 | dx}.
#pragma once

#include "warp_tile.h"

namespace dsp {

template <class T, int FILTERS>
struct ChwnGemm {
    static constexpr int kBlocks = 3;  // of a multiprocessor at once, as far as registers go
    static constexpr int kThreads = 128, kChunks = 16, kRows = 32, kStages = 4;
    static constexpr int kMT = FILTERS / 16, kNT = 4;  // of a warp
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kRowBytes = kChunks * 16;
    static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    // Where the thread's chunk lies; a chunk after the last one is put outside of every image.
    struct Column {
        int y, x, unit;
    };

    // Chunks of a row are permuted by the row's number, so that ldmatrix finds eight rows of one chunk in all banks.
    DSP_HD static int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) * 16); }

    DSP_HD static int chunks_of(const ConvParams& p) { return p.out_height * p.out_width * (p.batch / 8); }

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const int tile_number = block % p.tile_count;
        const int first_chunk = block / p.tile_count * kChunks;
        const Tile tile = p.tiles[tile_number];
        const int n8 = p.batch / 8, plane = p.height * p.width * n8, chunks = chunks_of(p);

        typename M::template PerThread<Column> columns;
        m.each_thread([&](int thread) {
            const int chunk = first_chunk + thread % kChunks;
            const int pixel = chunk / n8, row = pixel / p.out_width;
            Column& c = columns[thread];
            const int y = row * p.stride_y - p.pad_y;
            c.y = chunk < chunks ? y : kOutside;
            c.x = (pixel - row * p.out_width) * p.stride_x - p.pad_x;
            c.unit = chunk - pixel * n8 + (y * p.width + c.x) * n8;
        });

        const auto load = [&](int k_block) {
            const int stage = k_block % kStages * kStageBytes;
            m.each_thread([&](int thread) {
                const Vec16* weights =
                    static_cast<const Vec16*>(p.weights) + tile.weights + k_block * (kWeightBytes / 16);
#pragma unroll
                for (int i = 0; i < kWeightBytes / 16; i += kThreads) {
                    const int unit = i + thread;
                    if (kWeightBytes / 16 % kThreads == 0 || unit < kWeightBytes / 16)
                        m.copy16(thread, stage + unit * 16, weights + unit, true);
                }
                const Column& c = columns[thread];
                const int chunk = thread % kChunks;
                const Pair* taps = reinterpret_cast<const Pair*>(p.taps) + tile.taps + k_block * kRows;
#pragma unroll
                for (int row = thread / kChunks; row < kRows; row += kThreads / kChunks) {
                    const Pair tap = m.read(taps + row);
                    const int dy = tap_y(tap.second), dx = tap_x(tap.second);
                    const bool inside = static_cast<unsigned>(c.y + dy) < static_cast<unsigned>(p.height) &&
                                        static_cast<unsigned>(c.x + dx) < static_cast<unsigned>(p.width);
                    const int unit = inside ? c.unit + (dy * p.width + dx) * n8 + tap.first * plane : 0;
                    m.copy16(thread, stage + kWeightBytes + swizzled(row, chunk),
                             static_cast<const Vec16*>(p.x) + unit, inside);
                }
            });
        };

        typename M::template PerWarp<Sums<M, kMT, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        for (int k = 0; k < kStages - 1; ++k) {
            if (k < tile.k_blocks) load(k);
            m.commit();
        }
        for (int k = 0; k < tile.k_blocks; ++k) {
            m.template wait<kStages - 2>();
            m.sync();
            if (k + kStages - 1 < tile.k_blocks) load(k + kStages - 1);
            m.commit();
            const int stage = k % kStages * kStageBytes;
            m.each_warp([&](int warp) {
#pragma unroll
                for (int step = 0; step < kRows / 16; ++step)
                    multiply_step<T, true>(m, warp, sums[warp], stage, step, [&](int pair, int lane) {
                        return stage + kWeightBytes +
                               swizzled(step * 16 + lane % 16, warp * kNT + pair * 2 + lane / 16);
                    });
            });
        }
        m.template wait<0>();
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], warp * kNT * 8, kSumStride); });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = thread % kChunks, out_plane = chunks;
            if (first_chunk + chunk >= chunks) return;
#pragma unroll
            for (int filter = thread / kChunks; filter < FILTERS; filter += kThreads / kChunks) {
                const int row = tile_number * FILTERS + filter;
                const int channel = m.read(p.rows + row);
                if (channel < 0) continue;
                float value[8], bias[8];
                load_eight(m, thread, (filter * kSumStride + chunk * 8) * 4, chunk & 4, value);
                const float b = m.read(p.bias + row);
#pragma unroll
                for (int i = 0; i < 8; ++i) bias[i] = b;
                finish_eight<T>(m, p, value, bias,
                                static_cast<int64_t>(channel) * out_plane + first_chunk + chunk);
            }
        });
    }
};

}  // namespace dsp
