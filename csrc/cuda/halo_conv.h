// 3x3, stride 1, CHWN: a block stages a tile of pixels with its halo once per 16 channels, and all nine taps read it
// from shared memory: the gather of a tap is the row address that each lane gives to ldmatrix.
// A block takes tile_h x tile_w pixels x tile_n chunks of 8 images; at least two chunks where the batch has them,
// because 16 bytes are half of a sector. taps: input channels in blocks of 16, -1: none.
#pragma once

#include "warp_tile.h"

namespace dsp {

struct HaloTile {
    int filters;        // index of the filter tile
    int n0, x0, y0;     // first chunk of 8 images, first output pixel
    int n8;             // chunks of the batch
    int plane;          // chunks of a channel of x
    int width, chunks;  // of the halo
};

DSP_HD int halo_chunks(int tile_h, int tile_w, int tile_n) { return (tile_h + 2) * (tile_w + 2) * tile_n; }

DSP_FN HaloTile halo_tile(const ConvParams& p, int block) {
    const int across = block / p.tile_count, down = across / p.blocks_n, n8 = p.batch / 8;
    return {block % p.tile_count,
            across % p.blocks_n * p.tile_n,
            down % p.blocks_x * p.tile_w,
            down / p.blocks_x * p.tile_h,
            n8,
            p.height * p.width * n8,
            p.tile_w + 2,
            halo_chunks(p.tile_h, p.tile_w, p.tile_n)};
}

// Index of chunk `place` of the halo in a channel's plane, or -1 outside the image or the halo.
DSP_FN int halo_unit(const ConvParams& p, const HaloTile& at, int place) {
    const int pixel = place / p.tile_n, n = at.n0 + place - pixel * p.tile_n;
    const int row = pixel / at.width, y = at.y0 + row - p.pad_y, x = at.x0 + pixel - row * at.width - p.pad_x;
    const bool inside = place < at.chunks && n < at.n8 && is_inside(y, x, p.height, p.width);
    return inside ? (y * p.width + x) * at.n8 + n : -1;
}

// Stores the sums of the thread's chunk if the output has this pixel and these images.
template <class T, class K, class M>
DSP_FN void finish_pixel(M& m, const ConvParams& p, const HaloTile& at, int thread, int y, int x, int n) {
    if (y >= p.out_height || x >= p.out_width || n >= at.n8) return;
    const int plane = p.out_height * p.out_width * at.n8;
    finish_chunk<T, K>(m, p, thread, at.filters, plane, (y * p.out_width + x) * at.n8 + n);
}

template <class T, int FILTERS>
struct HaloConv {
    static constexpr int kBlocks = 2;  // resident per multiprocessor; bounds the registers
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

    // A chunk of the halo: its index in a channel's plane, or -1 outside the image.
    struct Source {
        int unit;
    };
    // Byte offsets in the halo of the n tiles whose addresses the lane provides.
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
