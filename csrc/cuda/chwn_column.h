// What the two implicit GEMMs in CHWN share: a thread gathers the column of one chunk of 8 images, which are
// neighbours in every channel's plane; a row of the reduction is one channel at one tap, 16 bytes of it.
#pragma once

#include "reduction.h"

namespace dsp {

// Where the first tap of a chunk lies; a chunk after the last one is put outside of every image.
struct ChwnColumn {
    int y, x, unit;
};

DSP_HD int output_chunks(const ConvParams& p) { return p.out_height * p.out_width * (p.batch / 8); }

DSP_FN ChwnColumn chwn_column(const ConvParams& p, int chunk) {
    const int n8 = p.batch / 8, pixel = chunk / n8, row = pixel / p.out_width;
    const int y = row * p.stride_y - p.pad_y, x = (pixel - row * p.out_width) * p.stride_x - p.pad_x;
    return {chunk < output_chunks(p) ? y : kOutside, x, chunk - pixel * n8 + (y * p.width + x) * n8};
}

// What `thread` copies of one block of the reduction: K::kRows / (K::kThreads / K::kChunks) rows of its column, each
// to K::place(row, chunk) from `target` on.
template <class K, class M>
DSP_FN void gather_rows(M& m, const ConvParams& p, const Tile& tile, int k_block, int thread, const ChwnColumn& c,
                        int target) {
    const int n8 = p.batch / 8, plane = p.height * p.width * n8;
    const Pair* taps = reinterpret_cast<const Pair*>(p.taps) + tile.taps + k_block * K::kRows;
#pragma unroll
    for (int row = thread / K::kChunks; row < K::kRows; row += K::kThreads / K::kChunks) {
        const Pair tap = m.read(taps + row);
        const int dy = tap_y(tap.second), dx = tap_x(tap.second);
        const bool inside = is_inside(c.y + dy, c.x + dx, p.height, p.width);
        const int unit = inside ? c.unit + (dy * p.width + dx) * n8 + tap.first * plane : 0;
        m.copy16(thread, target + K::place(row, thread % K::kChunks), static_cast<const Vec16*>(p.x) + unit, inside);
    }
}

// Block k of the reduction into its stage: the weights, then the rows.
template <class K, class M, class Columns>
DSP_FN void load_block(M& m, const ConvParams& p, const Tile& tile, Columns& columns, int k) {
    const int stage = k % K::kStages * K::kStageBytes;
    m.each_thread([&](int thread) {
        copy_weights<K::kWeightBytes, K::kThreads>(m, p, tile, k, thread, stage);
        gather_rows<K>(m, p, tile, k, thread, columns[thread], stage + K::kWeightBytes);
    });
}

}  // namespace dsp
