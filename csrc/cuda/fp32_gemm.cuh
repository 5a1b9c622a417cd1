// Implicit GEMM in float32 without tensor cores: every product is rounded once, as on the CPU. Both layouts.
// A block takes 32 filters x 64 positions, a thread 4 x 4 of them. In CHWN four neighbouring positions are four
// images of one pixel. taps: two numbers per row of the reduction: channel, dy << 16 | dx; weights: [row][filter].
#pragma once

#include "warp_tile.cuh"

namespace dsp {

template <bool NHWC>
struct Fp32Gemm {
    static constexpr int kBlocks = 4;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = 128, kFilters = 32, kPositions = 64, kOutputs = kPositions;
    static constexpr int kRows = 16, kStages = 3;
    static constexpr int kWeightBytes = kRows * kFilters * 4, kRowBytes = kPositions * 4;
    static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
    static int shared_bytes(int) { return kStages * kStageBytes; }
    static constexpr int kColumns = NHWC ? kPositions : kPositions / 4;  // pieces of a row that a thread copies
};

// Residual, activation and store of four pixels, `out_channels` values apart.
DSP_DEVICE void finish_apart(const ConvParams& p, float (&value)[4], int position, int positions, int channel) {
    const int64_t first = static_cast<int64_t>(position) * p.out_channels + channel;
    const int64_t step = p.out_channels;
    const float* residual = static_cast<const float*>(p.residual) + first;
    float* out = static_cast<float*>(p.out) + first;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (p.residual && position + j < positions) value[j] += residual[j * step];
    activate(value, p.activation);
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (position + j < positions) out[j * step] = value[j];
}

// Of four images of one pixel, which are contiguous.
DSP_DEVICE void finish_four(const ConvParams& p, float (&value)[4], int64_t unit) {
    if (p.residual) {
        const float4 more = static_cast<const float4*>(p.residual)[unit];
        value[0] += more.x, value[1] += more.y, value[2] += more.z, value[3] += more.w;
    }
    activate(value, p.activation);
    static_cast<float4*>(p.out)[unit] = make_float4(value[0], value[1], value[2], value[3]);
}

template <bool NHWC>
__global__ void __launch_bounds__(Fp32Gemm<NHWC>::kThreads, Fp32Gemm<NHWC>::kBlocks)
    fp32_gemm(const __grid_constant__ ConvParams p) {
    using K = Fp32Gemm<NHWC>;
    const int block = blockIdx.x, thread = threadIdx.x;
    const int tile_number = block % p.tile_count;
    const int first_position = block / p.tile_count * K::kPositions;
    const Tile tile = p.tiles[tile_number];
    const int image = p.out_height * p.out_width, positions = image * p.batch;
    // Numbers between neighbouring columns and channels of x.
    const int64_t step = NHWC ? p.in_channels : p.batch;
    const int64_t plane = NHWC ? 1 : static_cast<int64_t>(p.height) * p.width * p.batch;

    // The first tap of the position (in CHWN: of four) that this thread copies, and its number from x.
    const int own = first_position + thread % K::kColumns * (NHWC ? 1 : 4);
    const int n = NHWC ? own / image : own % p.batch;
    const int pixel = NHWC ? own - n * image : own / p.batch;
    const int line = pixel / p.out_width;
    const int y = own < positions ? line * p.stride_y - p.pad_y : kOutside;
    const int x = (pixel - line * p.out_width) * p.stride_x - p.pad_x;
    const int64_t number = (NHWC ? static_cast<int64_t>(n) * p.height * p.width * p.in_channels : n) +
                           (static_cast<int64_t>(y) * p.width + x) * step;

    const auto load = [&](int k) {
        const int stage = k % K::kStages * K::kStageBytes;
        copy_weights<K::kWeightBytes, K::kThreads>(p, tile, k, stage);
        const int2* taps = reinterpret_cast<const int2*>(p.taps) + tile.taps + k * K::kRows;
#pragma unroll
        for (int row = thread / K::kColumns; row < K::kRows; row += K::kThreads / K::kColumns) {
            const int2 tap = __ldg(taps + row);
            const int dy = tap_y(tap.y), dx = tap_x(tap.y);
            const bool inside = is_inside(y + dy, x + dx, p.height, p.width);
            const float* source =
                static_cast<const float*>(p.x) +
                (inside ? number + (static_cast<int64_t>(dy) * p.width + dx) * step + tap.x * plane : 0);
            const int target = stage + K::kWeightBytes + row * K::kRowBytes + thread % K::kColumns * (NHWC ? 4 : 16);
            if (NHWC)
                cp_async_4(target, source, inside);
            else
                cp_async_16(target, source, inside);
        }
    };

    float sums[4][4] = {};  // [filter][position]
    const int corner = thread / 16 * 4;
    each_block<K::kStages>(tile.k_blocks, load, [&](int k) {
        const char* stage = shared_memory + k % K::kStages * K::kStageBytes;
#pragma unroll
        for (int row = 0; row < K::kRows; ++row) {
            const float4 w = *reinterpret_cast<const float4*>(stage + (row * K::kFilters + corner) * 4);
            const float4 v =
                *reinterpret_cast<const float4*>(stage + K::kWeightBytes + row * K::kRowBytes + thread % 16 * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = fmaf((&w.x)[i], (&v.x)[j], sums[i][j]);
        }
    });
    const int position = first_position + thread % 16 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = tile_number * K::kFilters + corner + i;
        const int channel = __ldg(p.rows + row);
        if (channel < 0) continue;
        const float bias = __ldg(p.bias + row);
#pragma unroll
        for (float& v : sums[i]) v += bias;
        if (NHWC)
            finish_apart(p, sums[i], position, positions, channel);
        else if (position < positions)
            finish_four(p, sums[i], (static_cast<int64_t>(channel) * positions + position) / 4);
    }
}

}  // namespace dsp
