// The parameters of one convolution, the same for every kernel. Python (dsp_kernels/run/gpu/cuda/tables.py)
// makes the tables; launch_plan.h fills this from the op's list of sizes.
#pragma once

#include "numbers.h"

namespace dsp {

enum class Activation { none, relu, relu6, silu, hardswish };

// One entry of the tile table: the filters of one tile and what they read.
struct alignas(16) Tile {
    int weights;   // where its weights start, in 16-byte units
    int k_blocks;  // blocks of the reduction
    int taps;      // its first entry in the table of taps
    int unused;
};

struct ConvParams {
    const void* x;
    void* out;
    const void* residual;  // null, like out, or out itself
    const void* weights;   // in the order in which the kernel reads them
    const float* bias;     // [tiles * filters]
    const Tile* tiles;
    const int* rows;    // [tiles * filters] output channel of every filter, -1: none
    const int* runs;    // NHWC: [tiles * filters / 8] first channel where eight filters write an aligned run, or -1
    const int* taps;    // see each kernel
    const int* gather;  // NHWC: channels of octets that are no aligned run, eight each, -1: none
    int tile_count;
    int in_channels, out_channels;
    int batch, height, width, out_height, out_width;
    int stride_y, stride_x, pad_y, pad_x;
    int activation;
    // Halo kernel: pixels and 8-image chunks of a block, and the number of blocks along each.
    int tile_h, tile_w, tile_n, blocks_x, blocks_n;
};

// A row of the reduction: an input channel and the tap's offset in pixels, packed as dy << 16 | dx. Rows that pad
// a block have dy = kOutside, which is outside every image (sizes are checked against kLargestSide).
constexpr int kOutside = 0x7fff;
constexpr int kLargestSide = 16383;

DSP_HD int tap_y(int packed) { return packed >> 16; }
DSP_HD int tap_x(int packed) { return packed & 0xffff; }

DSP_HD bool is_inside(int y, int x, int height, int width) {
    return static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(width);
}

// In place, with one branch for all values.
template <int COUNT>
DSP_FN void activate(float (&value)[COUNT], int kind) {
    switch (static_cast<Activation>(kind)) {
        case Activation::relu:
#pragma unroll
            for (float& v : value) v = v < 0.f ? 0.f : v;
            break;
        case Activation::relu6:
#pragma unroll
            for (float& v : value) v = v < 0.f ? 0.f : (v > 6.f ? 6.f : v);
            break;
        case Activation::silu:
#pragma unroll
            for (float& v : value) v = v / (1.f + expf(-v));
            break;
        case Activation::hardswish:
#pragma unroll
            for (float& v : value) {
                const float t = v + 3.f;
                v = v * ((t < 0.f ? 0.f : (t > 6.f ? 6.f : t)) / 6.f);
            }
            break;
        default:
            break;
    }
}

}  // namespace dsp
