// A residual block as one kernel, CHWN, 16 bit: two or three convolutions of any kernel, stride and groups, and the
// shortcut's, on a tile of output pixels for tile_n chunks of 8 images. Intermediate feature maps stay in shared
// memory. A thread block moves down the image in turns and keeps the rows that the next turn needs; only the columns of
// the halo, and the rows above its first turn, are also computed by its neighbours.
//
// A work item is a tile of filters at kNT chunks of 8 images; one warp computes it, so there is no barrier within a
// convolution. Weights are read from global memory as fragments, one step ahead; a row of the reduction (one channel at
// one tap) is an address for ldmatrix, so any set of channels costs the same.
#pragma once

#include "warp_tile.cuh"

namespace dsp {

// The filters of one tile. offsets: index in the tables of its rows of the reduction, each the offset in shared memory
// of one channel at one tap, for the first output of the tile.
struct alignas(16) BlockTile {
    int weights;       // 16-byte units
    int steps;         // of 16 rows, from the convolution's own region
    int second_steps;  // from the block's input: the shortcut's convolution
    int offsets;
};

// value / divisor for a value up to kMostChunks and a divisor up to kLargestDivisor; by: 2^20 / divisor, rounded up.
DSP_DEVICE int divide_small(int value, int by) {
    return static_cast<int>((static_cast<uint32_t>(value) * static_cast<uint32_t>(by)) >> 20);
}

// First output of the thread block, in chunks of images and pixels.
struct BlockPlace {
    int n0, y0, x0;
};

// A chunk of a region's tile.
struct ChunkPlace {
    int row, column, n;
};

DSP_DEVICE ChunkPlace chunk_place(const BlockParams& p, const BlockRegion& region, int chunk) {
    const int pixel = divide_small(chunk, p.by_tile_n), row = divide_small(pixel, region.by_column);
    return {row, pixel - row * region.columns, chunk - pixel * p.tile_n};
}

DSP_DEVICE int chunks_of(const BlockParams& p, const BlockRegion& region) {
    return region.rows * region.columns * p.tile_n;
}

// How many threads process neighbouring pieces of `pieces`; the others take other channels.
template <int THREADS>
DSP_DEVICE int threads_along(int pieces) {
    return pieces <= 32 ? 32 : pieces <= 64 ? 64 : pieces <= 128 ? 128 : THREADS;
}

// The channels of x that the block reads, at the pixels and images of its first region, from a row on.
template <int THREADS>
DSP_DEVICE void load_input(const BlockParams& p, const BlockPlace& place, int first_row) {
    const BlockRegion& region = p.regions[0];
    const int first = first_row * region.columns * p.tile_n, chunks = chunks_of(p, region);
    const int lanes = threads_along<THREADS>(chunks - first), thread = threadIdx.x;
    const int plane = region.height * region.width * p.chunks_of_batch;
    for (int chunk = first + (thread & (lanes - 1)); chunk < chunks; chunk += lanes) {
        const ChunkPlace at = chunk_place(p, region, chunk);
        const int y = place.y0 * region.step_y + region.shift_y + at.row;
        const int x = place.x0 * region.step_x + region.shift_x + at.column;
        const int n = place.n0 + at.n;
        const bool inside = is_inside(y, x, region.height, region.width) && n < p.chunks_of_batch;
        const int unit = inside ? (y * region.width + x) * p.chunks_of_batch + n : 0;
#pragma unroll 4
        for (int slot = thread / lanes; slot < region.slots; slot += THREADS / lanes) {
            const int channel = __ldg(p.tables + p.channels_at + slot);
            cp_async_16(region.offset + slot * region.channel_bytes + chunk * 16,
                        static_cast<const uint4*>(p.x) + (inside ? channel * plane + unit : 0), inside);
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// Moves the rows that the next turn reads again to the top of their regions. A thread moves a column of one slot from
// the top down, so that it reads every row before overwriting it.
template <int THREADS>
DSP_DEVICE void keep_rows(const BlockParams& p) {
#pragma unroll 1
    for (int number = 0; number < p.conv_count; ++number) {
        const BlockRegion& region = p.regions[number];
        const int row_bytes = region.columns * p.tile_n * 16, down = (region.rows - region.kept) * row_bytes;
        const int lanes = threads_along<THREADS>(region.columns * p.tile_n), thread = threadIdx.x;
        for (int slot = thread / lanes; slot < region.slots; slot += THREADS / lanes)
            for (int piece = thread & (lanes - 1); piece < region.columns * p.tile_n; piece += lanes) {
                char* to = shared_memory + region.offset + slot * region.channel_bytes + piece * 16;
                for (int row = 0; row < region.kept; ++row, to += row_bytes)
                    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(to + down);
            }
    }
}

// sums += `steps` steps of the reduction, for the chunks of region `target` from `first` on. source_columns: of the
// region that is read, with these strides.
template <class T, int MT, int NT>
DSP_DEVICE void accumulate(float (&sums)[MT][NT][4], const BlockParams& p, const uint4* weights, const int* offsets,
                           int steps, const BlockRegion& target, int first, int source_columns, int stride_y,
                           int stride_x) {
    if (steps == 0) return;
    __syncwarp();  // ldmatrix and mma need all lanes
    const int lane = threadIdx.x % 32;
    uint4 a[MT], next[MT];
    int row, next_row;
    const auto load = [&](int step) {
#pragma unroll
        for (int i = 0; i < MT; ++i) next[i] = __ldg(weights + (step * MT + i) * 32 + lane);
        next_row = __ldg(offsets + step * 16 + lane % 16);
    };
    load(0);
    const int chunks = chunks_of(p, target);
    int base[NT / 2];  // offsets of the chunks whose addresses this lane gives
#pragma unroll
    for (int pair = 0; pair < NT / 2; ++pair) {
        const int chunk = first + pair * 2 + lane / 16;
        const ChunkPlace at = chunk_place(p, target, chunk < chunks ? chunk : 0);
        base[pair] = ((at.row * stride_y * source_columns + at.column * stride_x) * p.tile_n + at.n) * 16;
    }
#pragma unroll 2  // more of them spill on sm_100
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < MT; ++i) a[i] = next[i];
        row = next_row;
        if (step + 1 < steps) load(step + 1);
        multiply_fragments<T, true>(sums, a, [&](int pair) { return row + base[pair]; });
    }
}

// Bias and activation; stores the sums into the slots of the next region, zeros outside the map.
template <class T, int MT, int NT>
DSP_DEVICE void finish_in_shared(const float (&sums)[MT][NT][4], const BlockParams& p, int first_row, int activation,
                                 const BlockRegion& target, const BlockPlace& place, int first) {
    const int chunks = chunks_of(p, target), lane = threadIdx.x % 32;
    const int y0 = place.y0 * target.step_y + target.shift_y, x0 = place.x0 * target.step_x + target.shift_x;
    unsigned inside = 0;  // one bit per chunk
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        const ChunkPlace at = chunk_place(p, target, first + j < chunks ? first + j : 0);
        inside |= static_cast<unsigned>(is_inside(y0 + at.row, x0 + at.column, target.height, target.width)) << j;
    }
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + i * 16 + half * 8 + lane / 4;
            const int slot = __ldg(p.tables + p.targets_at + row);
            if (slot < 0) continue;
            const float bias = __ldg(p.bias + row);
            char* to = shared_memory + target.offset + slot * target.channel_bytes + first * 16 + lane % 4 * 4;
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                float value[2] = {sums[i][j][2 * half] + bias, sums[i][j][2 * half + 1] + bias};
                activate(value, activation);
                if (first + j < chunks)
                    *reinterpret_cast<uint32_t*>(to + j * 16) = inside >> j & 1 ? pack_two<T>(value[0], value[1]) : 0;
            }
        }
}

// v[j] of the lane that is number q of four <- v[q] of number j.
DSP_DEVICE void transpose_four(float (&v)[4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j & bit) continue;
            const float got = __shfl_xor_sync(0xffffffffu, lane & bit ? v[j] : v[j | bit], bit);
            (lane & bit ? v[j] : v[j | bit]) = got;
        }
}

// Bias, residual and activation; stores the sums into `out`: four lanes exchange their pairs of images, so that each
// has the eight of one chunk and stores 16 bytes.
template <class T, int MT, int NT>
DSP_DEVICE void finish_in_output(const float (&sums)[MT][NT][4], const BlockParams& p, int first_row, int activation,
                                 const BlockRegion& target, const BlockPlace& place, int first) {
    const BlockRegion& input = p.regions[0];
    const int chunks = chunks_of(p, target), lane = threadIdx.x % 32;
#pragma unroll
    for (int quad = 0; quad < NT / 4; ++quad) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float even[4], odd[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    even[j] = sums[i][quad * 4 + j][2 * half];
                    odd[j] = sums[i][quad * 4 + j][2 * half + 1];
                }
                transpose_four(even);
                transpose_four(odd);
                const int chunk = first + quad * 4 + lane % 4;
                const ChunkPlace at = chunk_place(p, target, chunk < chunks ? chunk : 0);
                const int y = place.y0 + at.row, x = place.x0 + at.column, n = place.n0 + at.n;
                const int row = first_row + i * 16 + half * 8 + lane / 4;
                const int channel = __ldg(p.tables + p.targets_at + row);
                if (channel < 0 || chunk >= chunks || y >= target.height || x >= target.width || n >= p.chunks_of_batch)
                    continue;
                const int64_t unit = static_cast<int64_t>(channel) * target.height * target.width * p.chunks_of_batch +
                                     (y * target.width + x) * p.chunks_of_batch + n;
                const float bias = __ldg(p.bias + row);
                float value[8];
#pragma unroll
                for (int j = 0; j < 4; ++j) value[2 * j] = even[j] + bias, value[2 * j + 1] = odd[j] + bias;
                if (p.residual_kind == static_cast<int>(Residual::tensor)) {
                    add_eight<T>(value, static_cast<const uint4*>(p.residual)[unit]);
                } else if (p.residual_kind == static_cast<int>(Residual::input)) {
                    const int slot = __ldg(p.tables + p.residuals_at + row);
                    const int pixel = (at.row - input.shift_y) * input.columns + at.column - input.shift_x;
                    add_eight<T>(value, *reinterpret_cast<const uint4*>(shared_memory + input.offset +
                                                                        slot * input.channel_bytes +
                                                                        (pixel * p.tile_n + at.n) * 16));
                }
                activate(value, activation);
                static_cast<uint4*>(p.out)[unit] = pack_eight<T>(value);
            }
    }
}

template <int FILTERS>
struct FusedBlock {
    static constexpr int kThreads = 256, kWarps = kThreads / 32;
    static constexpr int kBlocks = 2;  // resident per multiprocessor; bounds the registers
    static constexpr int kMT = FILTERS / 16, kNT = 8;
};

// Convolution `number` of the block, from row `from` of the region that it writes.
template <class T, int FILTERS, bool LAST>
DSP_DEVICE void convolve(const BlockParams& p, int number, const BlockPlace& place, int from) {
    using K = FusedBlock<FILTERS>;
    const BlockConv& conv = p.convs[number];
    const BlockRegion &source = p.regions[number], &target = p.regions[number + 1];
    const int begin = from * target.columns * p.tile_n;
    const int groups = (chunks_of(p, target) - begin + K::kNT - 1) / K::kNT;
    // Where possible the warps of one round have the same filters and share their weights in L1.
    for (int item = static_cast<int>(threadIdx.x) / 32; item < conv.tile_count * groups; item += K::kWarps) {
        const int tile_number = item / groups, first = begin + (item - tile_number * groups) * K::kNT;
        const int4 packed = __ldg(reinterpret_cast<const int4*>(p.tables + conv.tiles_at) + tile_number);
        const BlockTile tile = {packed.x, packed.y, packed.z, packed.w};
        const uint4* weights = static_cast<const uint4*>(p.weights) + tile.weights;
        const int* offsets = p.tables + tile.offsets;
        float sums[K::kMT][K::kNT][4] = {};
        accumulate<T>(sums, p, weights, offsets, tile.steps, target, first, source.columns, conv.stride_y,
                      conv.stride_x);
        if (LAST)
            accumulate<T>(sums, p, weights + tile.steps * K::kMT * 32, offsets + tile.steps * 16, tile.second_steps,
                          target, first, p.regions[0].columns, p.shortcut_stride_y, p.shortcut_stride_x);
        const int first_row = conv.first_row + tile_number * FILTERS;
        if (LAST)
            finish_in_output<T>(sums, p, first_row, conv.activation, target, place, first);
        else
            finish_in_shared<T>(sums, p, first_row, conv.activation, target, place, first);
    }
}

template <class T, int FILTERS>
__global__ void __launch_bounds__(FusedBlock<FILTERS>::kThreads, FusedBlock<FILTERS>::kBlocks)
    fused_block(const __grid_constant__ BlockParams p) {
    constexpr int kThreads = FusedBlock<FILTERS>::kThreads;
    const int block = blockIdx.x, across = block / p.blocks_n, down = across / p.blocks_x;
    const BlockRegion& output = p.regions[p.conv_count];
    const int span = p.turns * output.rows;  // rows of the image that this thread block computes
    BlockPlace place = {(block - across * p.blocks_n) * p.tile_n, down * span,
                        (across - down * p.blocks_x) * output.columns};
    do {
        const bool again = place.y0 % span != 0;  // the turn before has left rows
        if (again) {
            __syncthreads();
            keep_rows<kThreads>(p);
            __syncthreads();
        }
        load_input<kThreads>(p, place, again ? p.regions[0].kept : 0);
        __syncthreads();
#pragma unroll 1
        for (int number = 0; number + 1 < p.conv_count; ++number) {
            convolve<T, FILTERS, false>(p, number, place, again ? p.regions[number + 1].kept : 0);
            __syncthreads();
        }
        convolve<T, FILTERS, true>(p, p.conv_count - 1, place, 0);
        place.y0 += output.rows;
    } while (place.y0 % span != 0 && place.y0 < output.height);
}

}  // namespace dsp
