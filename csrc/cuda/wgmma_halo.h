// 3x3, stride 1, CHWN, for sm_90a: a halo tile like halo_conv.h in tiles of 64 filters, multiplied by wgmma straight
// from shared memory. Each of four warpgroups takes one line of the tile: up to 16 chunks (pixels x pieces of 8
// images), which lie one after the other in the halo, so that a tap is nothing but another start of the operand.
// taps: as in halo_conv.h. Weights of a block: [tap][k / 8][filter][8 numbers along k].
#pragma once

#include "halo_tile.h"
#include "reduction.h"
#include "warpgroup_tile.h"

namespace dsp {

template <class T, int FILTERS>
struct WgmmaHalo {
    static_assert(FILTERS == 64, "one warpgroup for each line");
    static constexpr int kBlocks = 1;  // of a multiprocessor at once, as far as registers go
    static constexpr int kLines = 4, kLineChunks = 16, kThreads = kLines * 128, kStages = 3, kChannels = 16;
    static constexpr int kFilters = FILTERS, kChunks = kLines * kLineChunks;
    static constexpr int kMostHalo = 192, kPerPass = kThreads / 8;  // chunks of the halo that are copied at once
    static constexpr int kCore = 128;  // bytes of a core matrix: 8 channels of a chunk
    static constexpr int kWeightBytes = 9 * FILTERS * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    DSP_HD static bool fits(int tile_h, int tile_w, int tile_n) {
        return tile_h <= kLines && tile_w * tile_n <= kLineChunks;
    }
    // A line is always read 16 chunks long; what lies behind a shorter one comes to sums that nobody reads.
    DSP_HD static int half_bytes(int halo) { return (halo + kLineChunks) * kCore; }
    DSP_HD static int stage_bytes(int halo) { return kWeightBytes + 2 * half_bytes(halo); }
    DSP_HD static int shared_bytes(int halo) {
        return kStages * stage_bytes(halo) > kSumBytes ? kStages * stage_bytes(halo) : kSumBytes;
    }

    // Chunks of the halo that the thread copies: where they lie in a channel's plane, or -1 outside of the image.
    struct Sources {
        int unit[kMostHalo / kPerPass];
    };

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const HaloTile at = halo_tile(p, block);
        const Tile tile = p.tiles[at.filters];
        const int per_half = half_bytes(at.chunks), per_stage = stage_bytes(at.chunks);

        typename M::template PerThread<Sources> sources;
        m.each_thread([&](int thread) {
#pragma unroll
            for (int i = 0; i < kMostHalo / kPerPass; ++i)
                sources[thread].unit[i] = halo_unit(p, at, i * kPerPass + thread / 8);
        });

        const auto load = [&](int k) {
            const int stage = k % kStages * per_stage;
            m.each_thread([&](int thread) {
                copy_weights<kWeightBytes, kThreads>(m, p, tile, k, thread, stage);
                // Eight lanes write the eight channels of a chunk, 128 bytes in one piece.
                const int* channels = p.taps + tile.taps + k * kChannels + thread % 8;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = m.read(channels + half * 8);
#pragma unroll
                    for (int i = 0; i < kMostHalo / kPerPass; ++i) {
                        const int place = i * kPerPass + thread / 8, unit = sources[thread].unit[i];
                        if (place >= at.chunks) continue;
                        const bool inside = unit >= 0 && channel >= 0;
                        m.copy16(thread, stage + kWeightBytes + half * per_half + place * kCore + thread % 8 * 16,
                                 static_cast<const Vec16*>(p.x) + (inside ? channel * at.plane + unit : 0), inside);
                    }
                }
            });
        };

        typename M::template PerWarp<WarpgroupSums<M, kLineChunks>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        // With a block of the reduction left under way ptxas makes every single product wait (C7515).
        each_block_by_warpgroups<kStages, 0>(m, tile.k_blocks, sums, load, [&](int group, int k) {
            const int stage = k % kStages * per_stage, line = group < p.tile_h ? group : p.tile_h - 1;
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                const int place = ((line + tap / 3) * at.width + tap % 3) * p.tile_n;
                m.template multiply_warpgroup<T>(
                    sums, group, Operand<Order::along_k>{stage + tap * FILTERS * kChannels * 2, FILTERS * 16, 128},
                    Operand<Order::along_mn>{stage + kWeightBytes + place * kCore, per_half, kCore});
            }
        });
        m.sync();
        m.each_warp([&](int warp) {
            store_by_filter(m, warp, sums[warp], warp / 4 * kLineChunks * 8, kSumStride, warp % 4 * 16);
        });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = thread % kChunks, line = chunk / kLineChunks, along = chunk % kLineChunks;
            if (line < p.tile_h && along < p.tile_w * p.tile_n)
                finish_pixel<T, WgmmaHalo>(m, p, at, thread, at.y0 + line, at.x0 + along / p.tile_n,
                                           at.n0 + along % p.tile_n);
        });
    }
};

}  // namespace dsp
