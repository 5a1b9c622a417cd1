// 3x3, stride 1, CHWN: a block stages a tile of pixels with its halo once per 16 channels, and all nine taps read it
// from shared memory: the gather of a tap is the row address that each lane gives to ldmatrix.
// A block takes tile_h x tile_w pixels x tile_n chunks of 8 images; at least two chunks where the batch has them,
// because 16 bytes are half of a sector. taps: input channels in blocks of 16, -1: none.
#pragma once

#include "warp_tile.cuh"

namespace dsp {

struct HaloTile {
    int filters;        // index of the filter tile
    int n0, x0, y0;     // first chunk of 8 images, first output pixel
    int n8;             // chunks of the batch
    int plane;          // chunks of a channel of x
    int width, chunks;  // of the halo
};

DSP_HD int halo_chunks(int tile_h, int tile_w, int tile_n) { return (tile_h + 2) * (tile_w + 2) * tile_n; }

DSP_DEVICE HaloTile halo_tile(const ConvParams& p) {
    const int block = blockIdx.x, across = block / p.tile_count, down = across / p.blocks_n, n8 = p.batch / 8;
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
DSP_DEVICE int halo_unit(const ConvParams& p, const HaloTile& at, int place) {
    const int pixel = place / p.tile_n, n = at.n0 + place - pixel * p.tile_n;
    const int row = pixel / at.width, y = at.y0 + row - p.pad_y, x = at.x0 + pixel - row * at.width - p.pad_x;
    const bool inside = place < at.chunks && n < at.n8 && is_inside(y, x, p.height, p.width);
    return inside ? (y * p.width + x) * at.n8 + n : -1;
}

// Copies one chunk of a channel, or zeros where `unit` or `channel` is -1.
DSP_DEVICE void copy_chunk(const ConvParams& p, const HaloTile& at, int offset, int channel, int unit) {
    const bool inside = unit >= 0 && channel >= 0;
    cp_async_16(offset, static_cast<const uint4*>(p.x) + (inside ? channel * at.plane + unit : 0), inside);
}

// Stores the sums of this thread's chunk if the output has this pixel and these images.
template <class T, class K>
DSP_DEVICE void finish_pixel(const ConvParams& p, const HaloTile& at, int y, int x, int n) {
    if (y >= p.out_height || x >= p.out_width || n >= at.n8) return;
    finish_chunk<T, K>(p, at.filters, p.out_height * p.out_width * at.n8, (y * p.out_width + x) * at.n8 + n);
}

template <int FILTERS>
struct HaloConv {
    static constexpr int kBlocks = 2;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = 256, kWarps = 8, kStages = 2;
    static constexpr int kChannels = 16, kRows = 9 * kChannels;  // of the reduction in a block
    static constexpr int kFilters = FILTERS, kMT = FILTERS / 16, kNT = 16 / kMT;
    static constexpr int kChunks = kWarps * kNT, kOutputs = kChunks * 8;
    static constexpr int kHaloLanes = FILTERS == 16 ? 256 : 128;
    static constexpr int kMostHalo = FILTERS == 16 ? 208 : 128;
    static constexpr int kWeightBytes = 9 * FILTERS * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    static bool fits(int tile_h, int tile_w, int tile_n) {
        return tile_h * tile_w * tile_n <= kChunks && halo_chunks(tile_h, tile_w, tile_n) <= kMostHalo;
    }
    // An odd number of chunks per channel, so that ldmatrix finds eight channels of one pixel in all banks.
    DSP_HD static int channel_bytes(int halo) { return (halo | 1) * 16; }
    DSP_HD static int stage_bytes(int halo) { return kWeightBytes + kChannels * channel_bytes(halo); }
    static int shared_bytes(int halo) { return std::max(kStages * stage_bytes(halo), kSumBytes); }
};

template <class T, int FILTERS>
__global__ void __launch_bounds__(HaloConv<FILTERS>::kThreads, HaloConv<FILTERS>::kBlocks)
    halo_conv(const __grid_constant__ ConvParams p) {
    using K = HaloConv<FILTERS>;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const HaloTile at = halo_tile(p);
    const Tile tile = p.tiles[at.filters];
    const int per_channel = K::channel_bytes(at.chunks), per_stage = K::stage_bytes(at.chunks);

    // The chunk of the halo that this thread copies, and the offsets in the halo of the n tiles whose addresses it
    // gives.
    const int place = thread % K::kHaloLanes, unit = halo_unit(p, at, place);
    int offsets[K::kNT / 2];
#pragma unroll
    for (int pair = 0; pair < K::kNT / 2; ++pair) {
        const int chunk = warp * K::kNT + pair * 2 + lane / 16;
        const int pixel = chunk / p.tile_n, line = pixel / p.tile_w;
        const int first = (line * at.width + pixel - line * p.tile_w) * p.tile_n + chunk - pixel * p.tile_n;
        offsets[pair] = line < p.tile_h ? first * 16 : 0;
    }

    const auto load = [&](int k) {
        const int stage = k % K::kStages * per_stage;
        copy_weights<K::kWeightBytes, K::kThreads>(p, tile, k, stage);
        const int* channels = p.taps + tile.taps + k * K::kChannels;
#pragma unroll 8
        for (int c = thread / K::kHaloLanes; c < K::kChannels; c += K::kThreads / K::kHaloLanes)
            if (place < at.chunks)
                copy_chunk(p, at, stage + K::kWeightBytes + c * per_channel + place * 16, __ldg(channels + c), unit);
    };

    float sums[K::kMT][K::kNT][4] = {};
    each_block<K::kStages>(tile.k_blocks, load, [&](int k) {
        const int stage = k % K::kStages * per_stage;
#pragma unroll 1  // all nine taps at once need more registers than two blocks per multiprocessor leave
        for (int dy = 0; dy < 3; ++dy)
#pragma unroll
            for (int dx = 0; dx < 3; ++dx) {
                const int tap = stage + K::kWeightBytes + (dy * at.width + dx) * p.tile_n * 16;
                multiply_step<T, true>(sums, stage, dy * 3 + dx,
                                       [&](int pair) { return tap + lane % 16 * per_channel + offsets[pair]; });
            }
    });
    __syncthreads();
    store_by_filter(sums, warp * K::kNT * 8, K::kSumStride);
    __syncthreads();
    const int chunk = thread % K::kChunks, pixel = chunk / p.tile_n, line = pixel / p.tile_w;
    if (line < p.tile_h)
        finish_pixel<T, K>(p, at, at.y0 + line, at.x0 + pixel - line * p.tile_w, at.n0 + chunk - pixel * p.tile_n);
}

}  // namespace dsp
