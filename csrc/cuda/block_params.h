// A chain of convolutions with its residual as one kernel sees it. Python (dsp_kernels/run/gpu/cuda/blocks/tables.py)
// makes the tables and the geometry; block_plan.h fills this from the op's list of sizes.
#pragma once

#include "conv_params.h"

namespace dsp {

constexpr int kMostConvs = 3;

// A tile of one map in shared memory, [slot of a channel][row][column][chunk of 8 images]. Pixels outside of the map
// hold zeros, as the padding of the convolution that reads them.
struct BlockRegion {
    int offset;         // bytes
    int channel_bytes;  // of a slot: an odd number of chunks, so that eight neighbouring slots lie in all banks
    int rows, columns;
    int height, width;  // of the map
    // Its first row in the map is that of the block's outputs times step plus shift.
    int step_y, step_x, shift_y, shift_x;
    int slots;
    int kept;       // rows that the next turn needs again
    int by_column;  // see divide_small
};

// Reads region i and writes region i + 1; the last one writes `out`.
struct BlockConv {
    int tile_count;
    int tiles_at;  // in the tables: BlockTile of each
    int first_row;  // of the table of rows and of the bias: tile_count * filters from here on
    int stride_y, stride_x;
    int activation;
};

// The filters of one tile. offsets: where in the tables its rows of the reduction begin: each is the place in shared
// memory of one channel at one tap, for the first output of the tile.
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
    int chunks_of_batch;            // batch / 8
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

}  // namespace dsp
