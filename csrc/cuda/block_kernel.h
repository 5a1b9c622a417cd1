// A residual block in one kernel, CHWN, 16-bit numbers: two or three convolutions of any kernel, stride and groups
// (and the one of the shortcut) on a tile of output pixels for tile_n chunks of 8 images. What passes between the
// convolutions stays in shared memory. A block goes down the image in turns and keeps the rows that the next turn needs
// again; only the halo's columns, and the rows above its first turn, are computed again by its neighbours.
#pragma once

#include "block_conv.h"

namespace dsp {

template <class T, int FILTERS>
struct FusedBlock {
    static constexpr int kThreads = 256, kWarps = kThreads / 32;
    static constexpr int kBlocks = 2;  // of a multiprocessor at once, as far as registers go
    static constexpr int kMT = FILTERS / 16, kNT = 8;

    template <class M>
    DSP_FN static void run(M& m, const BlockParams& p, int block) {
        const int across = block / p.blocks_n, down = across / p.blocks_x;
        const BlockRegion& output = p.regions[p.conv_count];
        BlockPlace place = {(block - across * p.blocks_n) * p.tile_n, down * p.turns * output.rows,
                            (across - down * p.blocks_x) * output.columns};
#pragma unroll 1
        for (int turn = 0; turn < p.turns && place.y0 < output.height; ++turn, place.y0 += output.rows) {
            if (turn > 0) {
                m.sync();
                keep_rows<kThreads>(m, p);
                m.sync();
            }
            load_input<kThreads>(m, p, place, turn > 0 ? p.regions[0].kept : 0);
            m.sync();
#pragma unroll 1
            for (int number = 0; number + 1 < p.conv_count; ++number) {
                convolve<false>(m, p, number, place, turn > 0 ? p.regions[number + 1].kept : 0);
                m.sync();
            }
            convolve<true>(m, p, p.conv_count - 1, place, 0);
        }
    }

    // From row `from` of the region that it writes on.
    template <bool LAST, class M>
    DSP_FN static void convolve(M& m, const BlockParams& p, int number, const BlockPlace& place, int from) {
        const BlockConv& conv = p.convs[number];
        const BlockRegion &source = p.regions[number], &target = p.regions[number + 1];
        const int begin = from * target.columns * p.tile_n;
        const int groups = (chunks_of(p, target) - begin + kNT - 1) / kNT;
        m.each_warp([&](int warp) {
            // Warps of one round have the same filters, as far as it goes, and meet their weights in L1.
            for (int item = warp; item < conv.tile_count * groups; item += kWarps) {
                const int tile_number = item / groups, first = begin + (item - tile_number * groups) * kNT;
                const BlockTile tile = read_tile(m, p.tables + conv.tiles_at, tile_number);
                const Vec16* weights = static_cast<const Vec16*>(p.weights) + tile.weights;
                const int* offsets = p.tables + tile.offsets;
                Sums<M, kMT, kNT> sums;
                clear(sums);
                accumulate<T>(m, warp, sums, p, weights, offsets, tile.steps, target, first, source.columns,
                              conv.stride_y, conv.stride_x);
                if (LAST)
                    accumulate<T>(m, warp, sums, p, weights + tile.steps * kMT * 32, offsets + tile.steps * 16,
                                  tile.second_steps, target, first, p.regions[0].columns, p.shortcut_stride_y,
                                  p.shortcut_stride_x);
                const int first_row = conv.first_row + tile_number * FILTERS;
                if (LAST)
                    finish_in_output<T>(m, warp, sums, p, first_row, conv.activation, target, place, first);
                else
                    finish_in_shared<T>(m, warp, sums, p, first_row, conv.activation, target, place, first);
            }
        });
    }
};

}  // namespace dsp
