// 3x3, stride 1, CHWN, for sm_90a: a halo tile like halo_conv.h in tiles of 64 filters, multiplied by wgmma straight
// from shared memory. Each of four warpgroups takes one line of the tile: up to 16 chunks (pixels x pieces of 8
// images), which lie one after the other in the halo, so that a tap is nothing but another start of the operand.
// taps: as in halo_conv.h. Weights of a block: [tap][k / 8][filter][8 numbers along k].
#pragma once

#include "warpgroup_tile.h"

namespace dsp {

template <class T, int FILTERS>
struct WgmmaHalo {
    static_assert(FILTERS == 64, "one warpgroup for each line");
    static constexpr int kBlocks = 1;  // of a multiprocessor at once, as far as registers go
    static constexpr int kLines = 4, kLineChunks = 16, kThreads = kLines * 128, kStages = 3, kChannels = 16;
    static constexpr int kChunks = kLines * kLineChunks;
    static constexpr int kMostHalo = 192, kPerPass = kThreads / 8;  // chunks of the halo that are copied at once
    static constexpr int kCore = 128;  // bytes of a core matrix: 8 channels of a chunk
    static constexpr int kWeightBytes = 9 * FILTERS * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    DSP_HD static bool fits(int tile_h, int tile_w, int tile_n) {
        return tile_h <= kLines && tile_w * tile_n <= kLineChunks;
    }
    DSP_HD static int halo_chunks(int tile_h, int tile_w, int tile_n) { return (tile_h + 2) * (tile_w + 2) * tile_n; }
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
        const int tile_number = block % p.tile_count;
        int rest = block / p.tile_count;
        const int n0 = rest % p.blocks_n * p.tile_n;
        rest /= p.blocks_n;
        const int x0 = rest % p.blocks_x * p.tile_w, y0 = rest / p.blocks_x * p.tile_h;
        const Tile tile = p.tiles[tile_number];
        const int n8 = p.batch / 8, plane = p.height * p.width * n8;
        const int halo_w = p.tile_w + 2, halo = halo_chunks(p.tile_h, p.tile_w, p.tile_n);
        const int per_half = half_bytes(halo), per_stage = stage_bytes(halo);

        typename M::template PerThread<Sources> sources;
        m.each_thread([&](int thread) {
#pragma unroll
            for (int i = 0; i < kMostHalo / kPerPass; ++i) {
                const int place = i * kPerPass + thread / 8;
                const int pixel = place / p.tile_n, n = n0 + place - pixel * p.tile_n;
                const int row = pixel / halo_w, y = y0 + row - p.pad_y, x = x0 + pixel - row * halo_w - p.pad_x;
                const bool inside = place < halo && n < n8 &&
                                    static_cast<unsigned>(y) < static_cast<unsigned>(p.height) &&
                                    static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
                sources[thread].unit[i] = inside ? (y * p.width + x) * n8 + n : -1;
            }
        });

        const auto load = [&](int k_block) {
            const int stage = k_block % kStages * per_stage;
            m.each_thread([&](int thread) {
                const Vec16* weights =
                    static_cast<const Vec16*>(p.weights) + tile.weights + k_block * (kWeightBytes / 16);
#pragma unroll
                for (int i = 0; i < kWeightBytes / 16; i += kThreads)
                    if (i + kThreads <= kWeightBytes / 16 || i + thread < kWeightBytes / 16)
                        m.copy16(thread, stage + (i + thread) * 16, weights + i + thread, true);
                // Eight lanes write the eight channels of a chunk, 128 bytes in one piece.
                const int* channels = p.taps + tile.taps + k_block * kChannels + thread % 8;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = m.read(channels + half * 8);
#pragma unroll
                    for (int i = 0; i < kMostHalo / kPerPass; ++i) {
                        const int place = i * kPerPass + thread / 8, unit = sources[thread].unit[i];
                        if (place >= halo) continue;
                        const bool inside = unit >= 0 && channel >= 0;
                        m.copy16(thread, stage + kWeightBytes + half * per_half + place * kCore + thread % 8 * 16,
                                 static_cast<const Vec16*>(p.x) + (inside ? channel * plane + unit : 0), inside);
                    }
                }
            });
        };

        typename M::template PerWarp<WarpgroupSums<M, kLineChunks>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        for (int k = 0; k < kStages - 1; ++k) {
            if (k < tile.k_blocks) load(k);
            m.commit();
        }
        for (int k = 0; k < tile.k_blocks; ++k) {
            m.template wait<kStages - 2>();
            m.publish();
            m.sync();
            const int stage = k % kStages * per_stage;
            m.each_warpgroup([&](int group) {
                const int line = group < p.tile_h ? group : p.tile_h - 1;
                m.begin_products();
#pragma unroll
                for (int tap = 0; tap < 9; ++tap) {
                    const int place = ((line + tap / 3) * halo_w + tap % 3) * p.tile_n;
                    m.template multiply_warpgroup<T>(
                        sums, group,
                        Operand<Order::along_k>{stage + tap * FILTERS * kChannels * 2, FILTERS * 16, 128},
                        Operand<Order::along_mn>{stage + kWeightBytes + place * kCore, per_half, kCore});
                }
                m.commit_products();
            });
            if (k + kStages - 1 < tile.k_blocks) load(k + kStages - 1);
            m.commit();
            // With a block of the reduction left under way ptxas makes every single product wait (C7515).
            m.template wait_products<0>(sums);
        }
        m.template wait<0>();
        m.sync();
        m.each_warp([&](int warp) {
            store_by_filter(m, warp, sums[warp], warp / 4 * kLineChunks * 8, kSumStride, warp % 4 * 16);
        });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = thread % kChunks, line = chunk / kLineChunks, at = chunk % kLineChunks;
            const int y = y0 + line, x = x0 + at / p.tile_n, n = n0 + at % p.tile_n;
            const bool used = line < p.tile_h && at < p.tile_w * p.tile_n;
            if (!used || y >= p.out_height || x >= p.out_width || n >= n8) return;
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
