// Implicit GEMM in CHWN like chwn_gemm.h, for sm_90a: tiles of 64 or 128 filters, multiplied by wgmma straight from
// shared memory. Filters are the M side, one warpgroup for 64 of them; the 128 positions are the N side, and a gathered
// row of the reduction is what the N-major operand wants: pieces of 8 images, any channel set at no cost.
// taps: as in chwn_gemm.h. Weights of a block: [k / 8][filter][8 numbers along k].
#pragma once

#include "chwn_column.h"
#include "warpgroup_tile.h"

namespace dsp {

template <class T, int FILTERS>
struct WgmmaGemm {
    static constexpr int kBlocks = FILTERS == 64 ? 4 : 2;  // of a multiprocessor at once, as far as registers go
    static constexpr int kThreads = FILTERS * 2, kChunks = 16, kRows = 32, kStages = 4;
    static constexpr int kFilters = FILTERS, kNT = kChunks;  // n tiles of a warpgroup
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kAtomBytes = 1024;
    static constexpr int kAtoms = kChunks / 8;  // along the positions
    static constexpr int kStageBytes = kWeightBytes + kRows / 8 * kAtoms * kAtomBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
    static_assert(kSumStride % 32 == 8, "store_by_filter");
    static_assert(kWeightBytes % kAtomBytes == 0, "atoms begin at multiples of their size");

    DSP_HD static int place(int row, int chunk) {
        return (row / 8 * kAtoms + chunk / 8) * kAtomBytes + in_atom(row % 8, chunk % 8);
    }

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const int tile_number = block % p.tile_count;
        const int first_chunk = block / p.tile_count * kChunks;
        const Tile tile = p.tiles[tile_number];

        typename M::template PerThread<ChwnColumn> columns;
        m.each_thread([&](int thread) { columns[thread] = chwn_column(p, first_chunk + thread % kChunks); });
        const auto load = [&](int k) { load_block<WgmmaGemm>(m, p, tile, columns, k); };

        typename M::template PerWarp<WarpgroupSums<M, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        // One block of the reduction is multiplied while the next one begins.
        each_block_by_warpgroups<kStages, 1>(m, tile.k_blocks, sums, load, [&](int group, int k) {
            const int stage = k % kStages * kStageBytes;
#pragma unroll
            for (int step = 0; step < kRows / 16; ++step)
                m.template multiply_warpgroup<T>(
                    sums, group,
                    Operand<Order::along_k>{stage + step * 2 * FILTERS * 16 + group * 64 * 16, FILTERS * 16, 128},
                    Operand<Order::swizzled>{stage + kWeightBytes + step * 2 * kAtoms * kAtomBytes, kAtomBytes,
                                             kAtoms * kAtomBytes});
        });
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], 0, kSumStride, warp * 16); });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = first_chunk + thread % kChunks, chunks = output_chunks(p);
            if (chunk < chunks) finish_chunk<T, WgmmaGemm>(m, p, thread, tile_number, chunks, chunk);
        });
    }
};

}  // namespace dsp
