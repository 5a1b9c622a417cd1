// What one launch is told. The lists of names below are the one description of it: Python (run/gpu/cuda/launch.py) has
// the same names, compares them with dsp_kernels_interface() when it loads the library, and passes the numbers in this
// order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DSP_HD __host__ __device__ __forceinline__
#else
#define DSP_HD inline
#endif

#define DSP_FIELD(name) int name;
#define DSP_ENUMERATOR(name) name,

#define DSP_KERNELS(F) F(chwn) F(halo) F(nhwc) F(fp32_chwn) F(fp32_nhwc) F(wgmma) F(wgmma_halo) F(nhwc_sliced)
#define DSP_ACTIVATIONS(F) F(none) F(relu) F(relu6) F(silu) F(hardswish)
#define DSP_RESIDUALS(F) F(none) F(input) F(tensor)

// clang-format off
// A convolution. tile_count: of `filters` filters each. *_at: where a part of the tables begins.
#define DSP_CONV_FIELDS(F) \
    F(kernel) F(filters) F(tile_count) F(rows_at) F(runs_at) F(taps_at) F(gather_at) \
    F(stride_y) F(stride_x) F(pad_y) F(pad_x) F(activation) \
    F(batch) F(in_channels) F(height) F(width) F(out_channels) F(out_height) F(out_width)

// A residual block. channels_at: channel of x of every slot of region 0; targets_at: per row (filter of a tile), its
// slot in the next region, or output channel, or -1; residuals_at: per row, the slot of region 0 that is added to it;
// table_size: of all tables. turns: of a thread block, tiles of output rows one below the other.
#define DSP_BLOCK_FIELDS(F) \
    F(filters) F(batch) F(in_channels) F(out_channels) F(tile_n) F(turns) F(shared_bytes) F(conv_count) \
    F(residual_kind) F(channels_at) F(targets_at) F(residuals_at) F(table_size) \
    F(shortcut_stride_y) F(shortcut_stride_x) F(by_tile_n)

// A tile of one feature map in shared memory, [slot of a channel][row][column][chunk of 8 images]. Pixels outside the
// map are zero: the padding of the convolution that reads them. offset, channel_bytes (of a slot): bytes; an odd number
// of chunks, so that eight neighbouring slots use all banks. rows, columns: of the tile; height, width: of the map. The
// tile's first row in the map is that of the block's outputs times step plus shift. kept: rows that the next turn reads
// again. by_column, by_tile_n: see divide_small.
#define DSP_REGION_FIELDS(F) \
    F(offset) F(channel_bytes) F(rows) F(columns) F(height) F(width) \
    F(step_y) F(step_x) F(shift_y) F(shift_x) F(slots) F(kept) F(by_column)

// Convolution i of a block reads region i and writes region i + 1; the last one writes `out`. tiles_at: BlockTile of
// each, in the tables; first_row: of the targets and of the bias, tile_count * filters from there on.
#define DSP_BLOCK_CONV_FIELDS(F) F(tile_count) F(tiles_at) F(first_row) F(stride_y) F(stride_x) F(activation)
// clang-format on

// Constants that Python must have too, and the value of each.
#define DSP_LIMITS(F) F(kOutside) F(kLargestSide) F(kMostConvs) F(kMostChunks) F(kLargestDivisor)

namespace dsp {

enum class Kernel { DSP_KERNELS(DSP_ENUMERATOR) };
enum class Activation { DSP_ACTIVATIONS(DSP_ENUMERATOR) };
enum class Residual { DSP_RESIDUALS(DSP_ENUMERATOR) };
enum class Dtype { float16, bfloat16, float32 };

// A row of the reduction: an input channel and the tap's offset in pixels, packed as dy << 16 | dx. Rows that pad
// a block have dy = kOutside, which is outside every image (sizes are checked against kLargestSide).
constexpr int kOutside = 0x7fff, kLargestSide = 16383;
constexpr int kMostConvs = 3;
// Chunks of a region, and its columns and chunks of images: see divide_small in block_kernel.cuh.
constexpr int kMostChunks = 4095, kLargestDivisor = 256;

// The tensors of a launch. residual: null, like out, or out itself; of a block any tensor but x.
struct Tensors {
    const void* x;
    void* out;
    const void* residual;
    const void* weights;  // in the order in which the kernel reads them
    const float* bias;    // per filter of every tile
    const int* tables;
};

struct ConvSizes {
    DSP_CONV_FIELDS(DSP_FIELD)
};
struct BlockRegion {
    DSP_REGION_FIELDS(DSP_FIELD)
};
struct BlockConv {
    DSP_BLOCK_CONV_FIELDS(DSP_FIELD)
};
struct BlockSizes {
    DSP_BLOCK_FIELDS(DSP_FIELD)
    BlockRegion regions[kMostConvs + 1];
    BlockConv convs[kMostConvs];
};

// One entry of the tile table: the filters of one tile and what they read.
struct alignas(16) Tile {
    int weights;   // where its weights start, in 16-byte units
    int k_blocks;  // blocks of the reduction
    int taps;      // its first entry in the table of taps
    int unused;
};

// The parameter of a convolution's kernel; launch.cu makes it.
struct ConvParams : ConvSizes, Tensors {
    const Tile* tiles;
    const int* rows;    // [tiles * filters] output channel of every filter, -1: none
    const int* runs;    // NHWC: [tiles * filters / 8] first channel where eight filters write an aligned run, or -1
    const int* taps;    // see each kernel
    const int* gather;  // NHWC: channels of octets that are no aligned run, eight each, -1: none
    // Halo kernels: pixels and 8-image chunks of a block, and the number of blocks along each.
    int tile_h, tile_w, tile_n, blocks_x, blocks_n;
};

// The parameter of a block's kernel. blocks_x, blocks_n: along a row and along the batch.
struct BlockParams : BlockSizes, Tensors {
    int chunks_of_batch, blocks_x, blocks_n;
};

}  // namespace dsp
