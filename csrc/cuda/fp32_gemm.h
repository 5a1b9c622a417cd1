// Implicit GEMM in float32 without tensor cores: every product is rounded once, as on the CPU. Both layouts.
// A block takes 32 filters x 64 positions, a thread 4 x 4 of them. In CHWN four neighbouring positions are four
// images of one pixel. taps: one Pair per row of the reduction: {channel, dy << 16 | dx}; weights: [row][filter].
#pragma once

#include "warp_tile.h"

namespace dsp {

template <bool NHWC>
struct Fp32Gemm {
    static constexpr int kBlocks = 4;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = 128, kFilters = 32, kPositions = 64, kRows = 16, kStages = 3;
    static constexpr int kWeightBytes = kRows * kFilters * 4, kRowBytes = kPositions * 4;
    static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kColumns = NHWC ? kPositions : kPositions / 4;  // pieces of a row that a thread copies

    struct Column {
        int y, x;
        int64_t number;
    };
    struct Corner {
        float at[4][4];  // [filter][position]
    };

    DSP_HD static int64_t positions_of(const ConvParams& p) {
        return static_cast<int64_t>(p.out_height) * p.out_width * p.batch;
    }

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const int tile_number = block % p.tile_count;
        const int first_position = block / p.tile_count * kPositions;
        const Tile tile = p.tiles[tile_number];
        const int positions = static_cast<int>(positions_of(p));
        // Numbers between neighbouring columns and channels of x.
        const int64_t step = NHWC ? p.in_channels : p.batch;
        const int64_t plane = NHWC ? 1 : static_cast<int64_t>(p.height) * p.width * p.batch;

        typename M::template PerThread<Column> columns;
        typename M::template PerThread<Corner> corners;
        m.each_thread([&](int thread) {
            const int position = first_position + thread % kColumns * (NHWC ? 1 : 4);
            const int image = p.out_height * p.out_width;
            const int n = NHWC ? position / image : position % p.batch;
            const int pixel = NHWC ? position - n * image : position / p.batch;
            const int row = pixel / p.out_width;
            Column& c = columns[thread];
            c.y = position < positions ? row * p.stride_y - p.pad_y : kOutside;
            c.x = (pixel - row * p.out_width) * p.stride_x - p.pad_x;
            const int64_t first = NHWC ? static_cast<int64_t>(n) * p.height * p.width * p.in_channels : n;
            c.number = first + (static_cast<int64_t>(c.y) * p.width + c.x) * step;
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) corners[thread].at[i][j] = 0.f;
        });

        const auto load = [&](int k) {
            const int stage = k % kStages * kStageBytes;
            m.each_thread([&](int thread) {
                copy_weights<kWeightBytes, kThreads>(m, p, tile, k, thread, stage);
                const Column& c = columns[thread];
                const Pair* taps = reinterpret_cast<const Pair*>(p.taps) + tile.taps + k * kRows;
#pragma unroll
                for (int row = thread / kColumns; row < kRows; row += kThreads / kColumns) {
                    const Pair tap = m.read(taps + row);
                    const int dy = tap_y(tap.second), dx = tap_x(tap.second);
                    const bool inside = is_inside(c.y + dy, c.x + dx, p.height, p.width);
                    const int64_t number =
                        inside ? c.number + (static_cast<int64_t>(dy) * p.width + dx) * step + tap.first * plane : 0;
                    const float* source = static_cast<const float*>(p.x) + number;
                    const int target = stage + kWeightBytes + row * kRowBytes + thread % kColumns * (NHWC ? 4 : 16);
                    if (NHWC)
                        m.copy4(thread, target, source, inside);
                    else
                        m.copy16(thread, target, reinterpret_cast<const Vec16*>(source), inside);
                }
            });
        };

        each_block<kStages>(m, tile.k_blocks, load, [&](int k) {
            const int stage = k % kStages * kStageBytes;
            m.each_thread([&](int thread) {
                float (&sum)[4][4] = corners[thread].at;
#pragma unroll
                for (int row = 0; row < kRows; ++row) {
                    float w[4], v[4];
                    m.load_four(thread, stage + (row * kFilters + thread / 16 * 4) * 4, w);
                    m.load_four(thread, stage + kWeightBytes + row * kRowBytes + thread % 16 * 16, v);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(w[i], v[j], sum[i][j]);
                }
            });
        });
        m.each_thread([&](int thread) {
            const int position = first_position + thread % 16 * 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = tile_number * kFilters + thread / 16 * 4 + i;
                const int channel = m.read(p.rows + row);
                if (channel < 0) continue;
                float (&value)[4] = corners[thread].at[i];
                const float bias = m.read(p.bias + row);
#pragma unroll
                for (float& v : value) v += bias;
                if (NHWC)
                    finish_apart(m, p, value, position, positions, channel);
                else if (position < positions)
                    finish_four(m, p, value, (static_cast<int64_t>(channel) * positions + position) / 4);
            }
        });
    }

    // Four pixels, `out_channels` values apart.
    template <class M>
    DSP_FN static void finish_apart(M& m, const ConvParams& p, float (&value)[4], int position, int positions,
                                    int channel) {
        const int64_t first = static_cast<int64_t>(position) * p.out_channels + channel;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (p.residual && position + j < positions)
                value[j] += m.read_residual(static_cast<const float*>(p.residual) + first +
                                            static_cast<int64_t>(j) * p.out_channels);
        activate(value, p.activation);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (position + j < positions)
                m.write(static_cast<float*>(p.out) + first + static_cast<int64_t>(j) * p.out_channels, value[j]);
    }

    // Four images of one pixel, which are contiguous.
    template <class M>
    DSP_FN static void finish_four(M& m, const ConvParams& p, float (&value)[4], int64_t unit) {
        if (p.residual) {
            const Vec16 more = m.read_residual(static_cast<const Vec16*>(p.residual) + unit);
#pragma unroll
            for (int j = 0; j < 4; ++j) value[j] += M::as_float(more.word[j]);
        }
        activate(value, p.activation);
        Vec16 packed;
#pragma unroll
        for (int j = 0; j < 4; ++j) packed.word[j] = M::as_word(value[j]);
        m.write(static_cast<Vec16*>(p.out) + unit, packed);
    }
};

}  // namespace dsp
