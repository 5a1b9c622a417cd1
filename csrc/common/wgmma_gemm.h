// Implicit GEMM in CHWN like chwn_gemm.h, for sm_90a: tiles of 64 or 128 filters, multiplied by wgmma straight from
// shared memory. Filters are the M side, one warpgroup for 64 of them; the 128 positions are the N side, and a gathered
// row of the reduction is what the N-major operand wants: pieces of 8 images, any channel set at no cost.
// taps: as in chwn_gemm.h. Weights of a block: [k / 8][filter][8 numbers along k].
#pragma once

#include "warpgroup_tile.h"

namespace dsp {

template <class T, int FILTERS>
struct WgmmaGemm {
    static constexpr int kBlocks = FILTERS == 64 ? 4 : 2;  // of a multiprocessor at once, as far as registers go
    static constexpr int kThreads = FILTERS * 2, kChunks = 16, kRows = 32, kStages = 4;
    static constexpr int kNT = kChunks;  // n tiles of a warpgroup
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kAtomBytes = 1024;
    static constexpr int kAtoms = kChunks / 8;  // along the positions
    static constexpr int kStageBytes = kWeightBytes + kRows / 8 * kAtoms * kAtomBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
    static_assert(kSumStride % 32 == 8, "store_by_filter");
    static_assert(kWeightBytes % kAtomBytes == 0, "atoms begin at multiples of their size");

    struct Column {
        int y, x, unit;
    };

    DSP_HD static int place(int row, int chunk) {
        return (row / 8 * kAtoms + chunk / 8) * kAtomBytes + in_atom(row % 8, chunk % 8);
    }

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
                for (int unit = thread; unit < kWeightBytes / 16; unit += kThreads)
                    m.copy16(thread, stage + unit * 16, weights + unit, true);
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
                    m.copy16(thread, stage + kWeightBytes + place(row, chunk), static_cast<const Vec16*>(p.x) + unit,
                             inside);
                }
            });
        };

        typename M::template PerWarp<WarpgroupSums<M, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        // One block of the reduction is multiplied while the next one begins, so a stage more than that is busy.
        for (int k = 0; k < kStages - 2; ++k) {
            if (k < tile.k_blocks) load(k);
            m.commit();
        }
        for (int k = 0; k < tile.k_blocks; ++k) {
            m.template wait<kStages - 3>();
            m.publish();
            m.sync();
            const int stage = k % kStages * kStageBytes;
            m.each_warpgroup([&](int group) {
                m.begin_products();
#pragma unroll
                for (int step = 0; step < kRows / 16; ++step)
                    m.template multiply_warpgroup<T>(
                        sums, group,
                        Operand<Order::along_k>{stage + step * 2 * FILTERS * 16 + group * 64 * 16, FILTERS * 16, 128},
                        Operand<Order::swizzled>{stage + kWeightBytes + step * 2 * kAtoms * kAtomBytes, kAtomBytes,
                                                 kAtoms * kAtomBytes});
                m.commit_products();
            });
            if (k + kStages - 2 < tile.k_blocks) load(k + kStages - 2);
            m.commit();
            m.template wait_products<1>(sums);
        }
        m.template wait<0>();
        m.template wait_products<0>(sums);
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], 0, kSumStride, warp * 16); });
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
