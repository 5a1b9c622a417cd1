// 3x3, stride 1, CHWN: a block stages a tile of pixels with its halo once per 16 channels, and all nine taps read it
// from shared memory: the gather of a tap is the row address that each lane gives to ldmatrix.
// A block takes tile_h x tile_w pixels x tile_n chunks of 8 images; at least two chunks where the batch has them,
// because 16 bytes are half of a sector. taps: input channels in blocks of 16, -1: none.
#pragma once

#include "halo_tile.h"
#include "reduction.h"

namespace dsp {

template <class T, int FILTERS>
struct HaloConv {
    static constexpr int kBlocks = 2;  // of a multiprocessor at once, as far as registers go
    static constexpr int kThreads = 256, kWarps = 8, kStages = 2, kChannels = 16;
    static constexpr int kFilters = FILTERS, kMT = FILTERS / 16, kNT = 16 / kMT;
    static constexpr int kChunks = kWarps * kNT;  // outputs of a block, in chunks of 8 images
    static constexpr int kHaloLanes = FILTERS == 16 ? 256 : 128;
    static constexpr int kMostHalo = FILTERS == 16 ? 208 : 128;
    static constexpr int kWeightBytes = 9 * FILTERS * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    DSP_HD static bool fits(int tile_h, int tile_w, int tile_n) { return tile_h * tile_w * tile_n <= kChunks; }
    // An odd number of chunks per channel, so that ldmatrix finds eight channels of one pixel in all banks.
    DSP_HD static int channel_bytes(int halo) { return (halo | 1) * 16; }
    DSP_HD static int stage_bytes(int halo) { return kWeightBytes + kChannels * channel_bytes(halo); }
    DSP_HD static int shared_bytes(int halo) {
        return kStages * stage_bytes(halo) > kSumBytes ? kStages * stage_bytes(halo) : kSumBytes;
    }

    // A chunk of the halo: where it lies in a channel's plane, or -1 outside of the image.
    struct Source {
        int unit;
    };
    // Where in the halo the n tiles start that the lane gives addresses for, in bytes.
    struct Targets {
        int offset[kNT / 2];
    };

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const HaloTile at = halo_tile(p, block);
        const Tile tile = p.tiles[at.filters];
        const int per_channel = channel_bytes(at.chunks), per_stage = stage_bytes(at.chunks);
        const int used = p.tile_h * p.tile_w * p.tile_n;

        typename M::template PerThread<Source> sources;
        typename M::template PerThread<Targets> targets;
        m.each_thread([&](int thread) {
            sources[thread].unit = halo_unit(p, at, thread % kHaloLanes);
#pragma unroll
            for (int pair = 0; pair < kNT / 2; ++pair) {
                const int chunk = thread / 32 * kNT + pair * 2 + thread % 32 / 16;
                const int pixel = chunk / p.tile_n, line = pixel / p.tile_w;
                const int place = (line * at.width + pixel - line * p.tile_w) * p.tile_n + chunk - pixel * p.tile_n;
                targets[thread].offset[pair] = chunk < used ? place * 16 : 0;
            }
        });

        const auto load = [&](int k) {
            const int stage = k % kStages * per_stage;
            m.each_thread([&](int thread) {
                copy_weights<kWeightBytes, kThreads>(m, p, tile, k, thread, stage);
                const int lane = thread % kHaloLanes, unit = sources[thread].unit;
                if (lane >= at.chunks) return;
                const int* channels = p.taps + tile.taps + k * kChannels;
#pragma unroll
                for (int c = thread / kHaloLanes; c < kChannels; c += kThreads / kHaloLanes) {
                    const int channel = m.read(channels + c);
                    const bool inside = unit >= 0 && channel >= 0;
                    m.copy16(thread, stage + kWeightBytes + c * per_channel + lane * 16,
                             static_cast<const Vec16*>(p.x) + (inside ? channel * at.plane + unit : 0), inside);
                }
            });
        };

        typename M::template PerWarp<Sums<M, kMT, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        each_block<kStages>(m, tile.k_blocks, load, [&](int k) {
            const int stage = k % kStages * per_stage;
            m.each_warp([&](int warp) {
#pragma unroll 1  // all nine taps at once need more registers than two blocks per multiprocessor leave
                for (int dy = 0; dy < 3; ++dy)
#pragma unroll
                    for (int dx = 0; dx < 3; ++dx) {
                        const int tap = stage + kWeightBytes + (dy * at.width + dx) * p.tile_n * 16;
                        multiply_step<T, true>(m, warp, sums[warp], stage, dy * 3 + dx, [&](int pair, int lane) {
                            return tap + lane % 16 * per_channel + targets[warp * 32 + lane].offset[pair];
                        });
                    }
            });
        });
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], warp * kNT * 8, kSumStride); });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = thread % kChunks;
            const int pixel = chunk / p.tile_n, line = pixel / p.tile_w;
            if (chunk < used)
                finish_pixel<T, HaloConv>(m, p, at, thread, at.y0 + line, at.x0 + pixel - line * p.tile_w,
                                          at.n0 + chunk - pixel * p.tile_n);
        });
    }
};

}  // namespace dsp
