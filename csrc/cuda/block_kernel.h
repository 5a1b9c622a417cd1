// A residual block as one kernel, CHWN, 16 bit: two or three convolutions of any kernel, stride and groups, and the
// shortcut's, on a tile of output pixels for tile_n chunks of 8 images. Intermediate feature maps stay in shared
// memory. A thread block moves down the image in turns and keeps the rows that the next turn needs; only the columns of
// the halo, and the rows above its first turn, are also computed by its neighbours.
//
// A work item is a tile of filters at kNT chunks of 8 images; one warp computes it, so there is no barrier within a
// convolution. Weights are read from global memory as fragments, one step ahead; a row of the reduction (one channel at
// one tap) is an address for ldmatrix, so any set of channels costs the same.
#pragma once

#include "warp_tile.h"

namespace dsp {

constexpr int kMostConvs = 3;

// A tile of one feature map in shared memory, [slot of a channel][row][column][chunk of 8 images]. Pixels outside the
// map are zero: the padding of the convolution that reads them.
struct BlockRegion {
    int offset;         // bytes
    int channel_bytes;  // of a slot: an odd number of chunks, so that eight neighbouring slots use all banks
    int rows, columns;
    int height, width;  // of the map
    // Its first row in the map is that of the block's outputs times step plus shift.
    int step_y, step_x, shift_y, shift_x;
    int slots;
    int kept;       // rows that the next turn reads again
    int by_column;  // see divide_small
};

// Reads region i and writes region i + 1; the last one writes `out`.
struct BlockConv {
    int tile_count;
    int tiles_at;   // in the tables: BlockTile of each
    int first_row;  // of the table of rows and of the bias: tile_count * filters from here on
    int stride_y, stride_x;
    int activation;
};

// The filters of one tile. offsets: index in the tables of its rows of the reduction, each the offset in shared memory
// of one channel at one tap, for the first output of the tile.
struct alignas(16) BlockTile {
    int weights;       // 16-byte units
    int steps;         // of 16 rows, from the convolution's own region
    int second_steps;  // from the block's input: the shortcut's convolution
    int offsets;
};

enum class Residual { none, input, tensor };

struct BlockParams {
    const void* x;
    void* out;
    const void* residual;  // null, or out itself, or any tensor but x
    const void* weights;
    const float* bias;
    const int* tables;
    int channels_at;   // channel of x of every slot of region 0
    int targets_at;    // per row: slot of the next region, or output channel; -1: none
    int residuals_at;  // per row of the last convolution: slot of region 0 that is added to it
    int conv_count, residual_kind;
    int shortcut_stride_y, shortcut_stride_x;
    int chunks_of_batch;             // batch / 8
    int tile_n, blocks_x, blocks_n;  // chunks of a block; blocks along a row and along the batch
    int turns;                       // of a block: tiles of output rows, one below the other
    int by_tile_n;                   // see divide_small
    BlockRegion regions[kMostConvs + 1];
    BlockConv convs[kMostConvs];
};

// Division of a number below 4096 by one of at most 256, as a product with divisor_of.
constexpr int kMostChunks = 4095, kLargestDivisor = 256;
DSP_HD int divisor_of(int number) { return ((1 << 20) + number - 1) / number; }
DSP_HD int divide_small(int value, int divisor) {
    return static_cast<int>((static_cast<uint32_t>(value) * static_cast<uint32_t>(divisor)) >> 20);
}

// First output of the block, in chunks of images and pixels.
struct BlockPlace {
    int n0, y0, x0;
};

// A chunk of a region's tile.
struct ChunkPlace {
    int row, column, n;
};

DSP_FN ChunkPlace chunk_place(const BlockParams& p, const BlockRegion& region, int chunk) {
    const int pixel = divide_small(chunk, p.by_tile_n), row = divide_small(pixel, region.by_column);
    return {row, pixel - row * region.columns, chunk - pixel * p.tile_n};
}

DSP_FN int chunks_of(const BlockParams& p, const BlockRegion& region) {
    return region.rows * region.columns * p.tile_n;
}

DSP_FN bool is_inside(const BlockRegion& region, int y, int x) { return is_inside(y, x, region.height, region.width); }

template <class M>
DSP_FN BlockTile read_tile(M& m, const int* tiles, int number) {
    const Vec16 packed = m.read(reinterpret_cast<const Vec16*>(tiles) + number);
    return {static_cast<int>(packed.word[0]), static_cast<int>(packed.word[1]), static_cast<int>(packed.word[2]),
            static_cast<int>(packed.word[3])};
}

// How many threads process neighbouring pieces of `pieces`; the others take other channels.
template <int THREADS>
DSP_FN int threads_along(int pieces) {
    return pieces <= 32 ? 32 : pieces <= 64 ? 64 : pieces <= 128 ? 128 : THREADS;
}

// The channels of x that the block reads, at the pixels and images of its first region, from a row on.
template <int THREADS, class M>
DSP_FN void load_input(M& m, const BlockParams& p, const BlockPlace& place, int first_row) {
    const BlockRegion& region = p.regions[0];
    const int first = first_row * region.columns * p.tile_n, chunks = chunks_of(p, region);
    const int lanes = threads_along<THREADS>(chunks - first);
    const int plane = region.height * region.width * p.chunks_of_batch;
    m.each_thread([&](int thread) {
        for (int chunk = first + (thread & (lanes - 1)); chunk < chunks; chunk += lanes) {
            const ChunkPlace at = chunk_place(p, region, chunk);
            const int y = place.y0 * region.step_y + region.shift_y + at.row;
            const int x = place.x0 * region.step_x + region.shift_x + at.column;
            const int n = place.n0 + at.n;
            const bool inside = is_inside(region, y, x) && n < p.chunks_of_batch;
            const int unit = inside ? (y * region.width + x) * p.chunks_of_batch + n : 0;
#pragma unroll 4
            for (int slot = thread / lanes; slot < region.slots; slot += THREADS / lanes) {
                const int channel = m.read(p.tables + p.channels_at + slot);
                m.copy16(thread, region.offset + slot * region.channel_bytes + chunk * 16,
                         static_cast<const Vec16*>(p.x) + (inside ? channel * plane + unit : 0), inside);
            }
        }
    });
    m.commit();
    m.template wait<0>();
}

// Moves the rows that the next turn reads again to the top of their regions. A thread moves a column of one slot from
// the top down, so that it reads every row before overwriting it.
template <int THREADS, class M>
DSP_FN void keep_rows(M& m, const BlockParams& p) {
#pragma unroll 1
    for (int number = 0; number < p.conv_count; ++number) {
        const BlockRegion& region = p.regions[number];
        const int row_bytes = region.columns * p.tile_n * 16, down = (region.rows - region.kept) * row_bytes;
        const int lanes = threads_along<THREADS>(region.columns * p.tile_n);
        m.each_thread([&](int thread) {
            for (int slot = thread / lanes; slot < region.slots; slot += THREADS / lanes)
                for (int piece = thread & (lanes - 1); piece < region.columns * p.tile_n; piece += lanes) {
                    int offset = region.offset + slot * region.channel_bytes + piece * 16;
                    for (int row = 0; row < region.kept; ++row, offset += row_bytes)
                        m.store16(thread, offset, m.load16(thread, offset + down));
                }
        });
    }
}

// Byte offsets of the chunks whose addresses a lane provides.
template <int NT>
struct ChunkOffsets {
    int at[NT / 2];
};

// sums += `steps` steps of the reduction, for the chunks of `target` from `first` on. source_columns: of the region
// that is read, with these strides.
template <class T, class M, int MT, int NT>
DSP_FN void accumulate(M& m, int warp, Sums<M, MT, NT>& sums, const BlockParams& p, const Vec16* weights,
                       const int* offsets, int steps, const BlockRegion& target, int first, int source_columns,
                       int stride_y, int stride_x) {
    if (steps == 0) return;
    m.converge();
    typename M::template PerLane<ChunkOffsets<NT>> base;
    typename M::template PerLane<int> row, next_row;
    typename M::Quad a[MT], next[MT];
    const auto load = [&](int step) {
#pragma unroll
        for (int i = 0; i < MT; ++i) m.read_fragment(warp, next[i], weights + (step * MT + i) * 32);
        m.each_lane(warp, [&](int lane) { next_row[lane] = m.read(offsets + step * 16 + lane % 16); });
    };
    load(0);
    const int chunks = chunks_of(p, target);
    m.each_lane(warp, [&](int lane) {
#pragma unroll
        for (int pair = 0; pair < NT / 2; ++pair) {
            const int chunk = first + pair * 2 + lane / 16;
            const ChunkPlace at = chunk_place(p, target, chunk < chunks ? chunk : 0);
            base[lane].at[pair] = ((at.row * stride_y * source_columns + at.column * stride_x) * p.tile_n + at.n) * 16;
        }
    });
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < MT; ++i) a[i] = next[i];
        m.each_lane(warp, [&](int lane) { row[lane] = next_row[lane]; });
        if (step + 1 < steps) load(step + 1);
        multiply_fragments<T, true>(m, warp, sums, a,
                                    [&](int pair, int lane) { return row[lane] + base[lane].at[pair]; });
    }
}

// Bias and activation; stores the sums into the slots of the next region, zeros outside the map.
template <class T, class M, int MT, int NT>
DSP_FN void finish_in_shared(M& m, int warp, Sums<M, MT, NT>& sums, const BlockParams& p, int first_row, int activation,
                             const BlockRegion& target, const BlockPlace& place, int first) {
    const int chunks = chunks_of(p, target);
    const int y0 = place.y0 * target.step_y + target.shift_y, x0 = place.x0 * target.step_x + target.shift_x;
    m.each_lane(warp, [&](int lane) {
        unsigned inside = 0;  // one bit per chunk
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            const ChunkPlace at = chunk_place(p, target, first + j < chunks ? first + j : 0);
            inside |= static_cast<unsigned>(is_inside(target, y0 + at.row, x0 + at.column)) << j;
        }
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + i * 16 + half * 8 + lane / 4;
                const int slot = m.read(p.tables + p.targets_at + row);
                if (slot < 0) continue;
                const float bias = m.read(p.bias + row);
                const int offset = target.offset + slot * target.channel_bytes + first * 16 + lane % 4 * 4;
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    float value[2] = {M::get(sums.at[i][j], 2 * half, lane) + bias,
                                      M::get(sums.at[i][j], 2 * half + 1, lane) + bias};
                    activate(value, activation);
                    const uint32_t word =
                        static_cast<uint32_t>(T::narrow(value[0])) | static_cast<uint32_t>(T::narrow(value[1])) << 16;
                    if (first + j < chunks) m.store_word(warp * 32 + lane, offset + j * 16, inside >> j & 1 ? word : 0);
                }
            }
    });
}

// v[j] of the lane that is number q of four <- v[q] of number j.
template <class M>
DSP_FN void transpose_four(M& m, int warp, typename M::template PerLane<float> (&v)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j & bit) continue;
            typename M::template PerLane<float> sent;
            m.each_lane(warp, [&](int lane) { sent[lane] = lane & bit ? v[j][lane] : v[j | bit][lane]; });
            m.exchange(warp, sent, bit);
            m.each_lane(warp, [&](int lane) {
                v[j][lane] = lane & bit ? sent[lane] : v[j][lane];
                v[j | bit][lane] = lane & bit ? v[j | bit][lane] : sent[lane];
            });
        }
}

// Bias, residual and activation; stores the sums into `out`: four lanes exchange their pairs of images, so that each
// has the eight of one chunk and stores 16 bytes.
template <class T, class M, int MT, int NT>
DSP_FN void finish_in_output(M& m, int warp, Sums<M, MT, NT>& sums, const BlockParams& p, int first_row, int activation,
                             const BlockRegion& target, const BlockPlace& place, int first) {
    const int chunks = chunks_of(p, target);
    const BlockRegion& input = p.regions[0];
#pragma unroll
    for (int quad = 0; quad < NT / 4; ++quad) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                typename M::template PerLane<float> even[4], odd[4];
                m.each_lane(warp, [&](int lane) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        even[j][lane] = M::get(sums.at[i][quad * 4 + j], 2 * half, lane);
                        odd[j][lane] = M::get(sums.at[i][quad * 4 + j], 2 * half + 1, lane);
                    }
                });
                transpose_four(m, warp, even);
                transpose_four(m, warp, odd);
                m.each_lane(warp, [&](int lane) {
                    const int chunk = first + quad * 4 + lane % 4;
                    const ChunkPlace at = chunk_place(p, target, chunk < chunks ? chunk : 0);
                    const int y = place.y0 + at.row, x = place.x0 + at.column, n = place.n0 + at.n;
                    const int row = first_row + i * 16 + half * 8 + lane / 4;
                    const int channel = m.read(p.tables + p.targets_at + row);
                    if (channel < 0 || chunk >= chunks || y >= target.height || x >= target.width ||
                        n >= p.chunks_of_batch)
                        return;
                    const int64_t unit =
                        static_cast<int64_t>(channel) * target.height * target.width * p.chunks_of_batch +
                        (y * target.width + x) * p.chunks_of_batch + n;
                    const float bias = m.read(p.bias + row);
                    float value[8];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        value[2 * j] = even[j][lane] + bias;
                        value[2 * j + 1] = odd[j][lane] + bias;
                    }
                    if (p.residual_kind == static_cast<int>(Residual::tensor)) {
                        add_eight<T>(value, m.read_residual(static_cast<const Vec16*>(p.residual) + unit));
                    } else if (p.residual_kind == static_cast<int>(Residual::input)) {
                        const int slot = m.read(p.tables + p.residuals_at + row);
                        const int pixel = (at.row - input.shift_y) * input.columns + at.column - input.shift_x;
                        add_eight<T>(value, m.load16(warp * 32 + lane, input.offset + slot * input.channel_bytes +
                                                                           (pixel * p.tile_n + at.n) * 16));
                    }
                    activate(value, activation);
                    m.write(static_cast<Vec16*>(p.out) + unit, narrow_eight<T>(value));
                });
            }
    }
}

template <class T, int FILTERS>
struct FusedBlock {
    static constexpr int kThreads = 256, kWarps = kThreads / 32;
    static constexpr int kBlocks = 2;  // resident per multiprocessor; bounds the registers
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

    // Starts at row `from` of the region that it writes.
    template <bool LAST, class M>
    DSP_FN static void convolve(M& m, const BlockParams& p, int number, const BlockPlace& place, int from) {
        const BlockConv& conv = p.convs[number];
        const BlockRegion &source = p.regions[number], &target = p.regions[number + 1];
        const int begin = from * target.columns * p.tile_n;
        const int groups = (chunks_of(p, target) - begin + kNT - 1) / kNT;
        m.each_warp([&](int warp) {
            // Where possible the warps of one round have the same filters and share their weights in L1.
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
