// The part of a plan that is about pixels: sizes, covering vectors.
#include <cstring>

#include "plan.h"

namespace dsp {

int output_size(int size, int kernel, int stride, int padding, int dilation, bool ceil_mode) {
    const int64_t free = int64_t(size) + 2 * padding - int64_t(dilation) * (kernel - 1) - 1;
    if (free < 0) return -1;
    int64_t count = free / stride + 1;
    if (ceil_mode && free % stride) {
        ++count;
        // The last window has to begin inside the input or its left padding.
        if ((count - 1) * stride >= int64_t(size) + padding) --count;
    }
    return int(count);
}

Vectors cover(const Geometry& g, int lanes) {
    const int64_t row = int64_t(g.w) * g.interleave, pitch = g.pitch * g.interleave;
    const int64_t per_row = (row + lanes - 1) / lanes;
    const int64_t flat = ((g.h - 1) * pitch + row + lanes - 1) / lanes;
    // A row's last vector may only run over pad columns, never into the next row.
    const bool rows_fit = per_row * lanes <= pitch || g.h == 1;
    const bool by_row = rows_fit && per_row * g.h <= flat;
    Vectors vectors;
    vectors.covers_pads = !by_row;
    if (by_row) {
        for (int64_t y = 0; y < g.h; ++y)
            for (int64_t v = 0; v < per_row; ++v) vectors.at.push_back(int32_t(y * pitch + v * lanes));
        if (row % lanes == 0) return vectors;
    } else {
        for (int64_t v = 0; v < flat; ++v) vectors.at.push_back(int32_t(v * lanes));
    }
    vectors.mask.resize(vectors.at.size() * lanes);
    for (size_t v = 0; v < vectors.at.size(); ++v)
        for (int l = 0; l < lanes; ++l) {
            const int64_t d = vectors.at[v] + l;
            const bool live = d / pitch < g.h && d % pitch < row;
            vectors.mask[v * lanes + l] = live ? -1 : 0;
        }
    return vectors;
}

} // namespace dsp
