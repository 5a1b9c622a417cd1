// 3x3, stride 1, CHWN: a block stages a tile of pixels with its halo once per 16 channels, and all nine taps read it
// from shared memory: the gather of a tap is the row address that each lane gives to ldmatrix.
// A block takes tile_h x tile_w pixels x tile_n chunks of 8 images; at least two chunks where the batch has them,
// because 16 bytes are half of a sector. taps: input channels in blocks of 16, -1: none.
#pragma once

#include "warp_tile.h"

namespace dsp {

template <class T, int FILTERS>
struct HaloConv {
    static constexpr int kBlocks = 2;  // of a multiprocessor at once, as far as registers go
    static constexpr int kThreads = 256, kWarps = 8, kStages = 2, kChannels = 16;
    static constexpr int kMT = FILTERS / 16, kNT = 16 / kMT;
    static constexpr int kChunks = kWarps * kNT;  // outputs of a block, in chunks of 8 images
    static constexpr int kHaloLanes = FILTERS == 16 ? 256 : 128;
    static constexpr int kMostHalo = FILTERS == 16 ? 208 : 128;
    static constexpr int kWeightBytes = 9 * FILTERS * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    DSP_HD static bool fits(int tile_h, int tile_w, int tile_n) { return tile_h * tile_w * tile_n <= kChunks; }
    DSP_HD static int halo_chunks(int tile_h, int tile_w, int tile_n) { return (tile_h + 2) * (tile_w + 2) * tile_n; }
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
        const int tile_number = block % p.tile_count;
        int rest = block / p.tile_count;
        const int n0 = rest % p.blocks_n * p.tile_n;
        rest /= p.blocks_n;
        const int x0 = rest % p.blocks_x * p.tile_w, y0 = rest / p.blocks_x * p.tile_h;
        const Tile tile = p.tiles[tile_number];
        const int n8 = p.batch / 8, plane = p.height * p.width * n8;
        const int halo_w = p.tile_w + 2, halo = halo_chunks(p.tile_h, p.tile_w, p.tile_n);
        const int per_channel = channel_bytes(halo), per_stage = stage_bytes(halo);
        const int used = p.tile_h * p.tile_w * p.tile_n;

        typename M::template PerThread<Source> sources;
        typename M::template PerThread<Targets> targets;
        m.each_thread([&](int thread) {
            const int lane = thread % kHaloLanes;
            const int pixel = lane / p.tile_n, n = n0 + lane - pixel * p.tile_n;
            const int row = pixel / halo_w, y = y0 + row - p.pad_y, x = x0 + pixel - row * halo_w - p.pad_x;
            const bool inside = lane < halo && n < n8 && static_cast<unsigned>(y) < static_cast<unsigned>(p.height) &&
                                static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
            sources[thread].unit = inside ? (y * p.width + x) * n8 + n : -1;
#pragma unroll
            for (int pair = 0; pair < kNT / 2; ++pair) {
                const int chunk = thread / 32 * kNT + pair * 2 + thread % 32 / 16;
                const int at = chunk / p.tile_n, line = at / p.tile_w;
                const int place = (line * halo_w + at - line * p.tile_w) * p.tile_n + chunk - at * p.tile_n;
                targets[thread].offset[pair] = chunk < used ? place * 16 : 0;
            }
        });

        const auto load = [&](int k_block) {
            const int stage = k_block % kStages * per_stage;
            m.each_thread([&](int thread) {
                const Vec16* weights =
                    static_cast<const Vec16*>(p.weights) + tile.weights + k_block * (kWeightBytes / 16);
                for (int unit = thread; unit < kWeightBytes / 16; unit += kThreads)
                    m.copy16(thread, stage + unit * 16, weights + unit, true);
                const int lane = thread % kHaloLanes, unit = sources[thread].unit;
                if (lane >= halo) return;
                const int* channels = p.taps + tile.taps + k_block * kChannels;
#pragma unroll
                for (int c = thread / kHaloLanes; c < kChannels; c += kThreads / kHaloLanes) {
                    const int channel = m.read(channels + c);
                    const bool inside = unit >= 0 && channel >= 0;
                    m.copy16(thread, stage + kWeightBytes + c * per_channel + lane * 16,
                             static_cast<const Vec16*>(p.x) + (inside ? channel * plane + unit : 0), inside);
                }
            });
        };

        typename M::template PerWarp<Sums<M, kMT, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        if (tile.k_blocks > 0) load(0);
        m.commit();
        for (int k = 0; k < tile.k_blocks; ++k) {
            m.template wait<0>();
            m.sync();
            if (k + 1 < tile.k_blocks) load(k + 1);
            m.commit();
            const int stage = k % kStages * per_stage;
            m.each_warp([&](int warp) {
#pragma unroll 1  // all nine taps at once need more registers than two blocks per multiprocessor leave
                for (int dy = 0; dy < 3; ++dy)
#pragma unroll
                    for (int dx = 0; dx < 3; ++dx) {
                        const int tap = stage + kWeightBytes + (dy * halo_w + dx) * p.tile_n * 16;
                        multiply_step<T, true>(m, warp, sums[warp], stage, dy * 3 + dx, [&](int pair, int lane) {
                            return tap + lane % 16 * per_channel + targets[warp * 32 + lane].offset[pair];
                        });
                    }
            });
        }
        m.template wait<0>();
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], warp * kNT * 8, kSumStride); });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = thread % kChunks;
            const int at = chunk / p.tile_n, line = at / p.tile_w;
            const int y = y0 + line, x = x0 + at - line * p.tile_w, n = n0 + chunk - at * p.tile_n;
            if (chunk >= used || y >= p.out_height || x >= p.out_width || n >= n8) return;
            const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width * n8;
            const int unit = (y * p.out_width + x) * n8 + n;
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
                finish_eight<T>(m, p, value, bias, channel * out_plane + unit);
            }
        });
    }
};

}  // namespace dsp
