// Between a caller's tensors, of any strides, and the planar layout.
#include <algorithm>
#include <cstring>

#include "ops.h"

namespace dsp {

namespace {

constexpr int channel_block = 16; // channels_last: floats of one cache line

// Rows [first, last) of channels of one image; visit(c, y, count of channels) does one piece.
template <typename Visit>
void by_blocks(bool channels_last, int first, int last, int rows, const Visit& visit) {
    // A pixel's channels lie together in channels_last, so a block of them is moved for a whole row at once.
    const int block = channels_last ? channel_block : 1;
    for (int c = first; c < last; c += block)
        for (int y = 0; y < rows; ++y) visit(c, y, std::min(block, last - c));
}

} // namespace

void LoadOp::run(int chunk, const Context& context) const {
    const Images& x = (*context.inputs)[number];
    const Geometry& g = to.geometry;
    const Range range = cut(g.channels, chunks, chunk);
    const int I = g.interleave;
    float* base = to.in(context);
    clear_pads(to, base, range.first, range.last, true);
    by_blocks(x.stride[1] == 1 && g.channels > 1, range.first, range.last, g.h, [&](int c, int y, int count) {
        for (int i = 0; i < I; ++i) {
            float* row = base + g.at(c, y, 0) + i;
            const float* source = x.base + (context.first + i) * x.stride[0] + c * x.stride[1] + y * x.stride[2];
            if (i >= context.count) {
                for (int k = 0; k < count; ++k)
                    for (int w = 0; w < g.w; ++w) row[k * g.plane + w * I] = 0.0f;
            } else if (count == 1) {
                if (!used[c]) continue;
                if (x.stride[3] == 1 && I == 1)
                    std::memcpy(row, source, sizeof(float) * g.w);
                else
                    for (int64_t w = 0; w < g.w; ++w) row[w * I] = source[w * x.stride[3]];
            } else {
                for (int64_t w = 0; w < g.w; ++w)
                    for (int k = 0; k < count; ++k) row[k * g.plane + w * I] = source[w * x.stride[3] + k];
            }
        }
    });
}

void StoreOp::run(int chunk, const Context& context) const {
    const Images& y = (*context.outputs)[number];
    const Geometry& g = from.geometry;
    const Range range = cut(g.channels, chunks, chunk);
    const int I = g.interleave;
    by_blocks(y.stride[1] == 1 && g.channels > 1, range.first, range.last, g.h, [&](int c, int h, int count) {
        for (int i = 0; i < context.count; ++i) {
            const float* row = from.plane(context, c) + g.at(0, h, 0) + i;
            float* target = y.base + (context.first + i) * y.stride[0] + c * y.stride[1] + h * y.stride[2];
            if (count == 1) {
                if (y.stride[3] == 1 && I == 1)
                    std::memcpy(target, row, sizeof(float) * g.w);
                else
                    for (int64_t w = 0; w < g.w; ++w) target[w * y.stride[3]] = row[w * I];
            } else {
                for (int64_t w = 0; w < g.w; ++w)
                    for (int k = 0; k < count; ++k)
                        target[w * y.stride[3] + k] = from.plane(context, c + k)[g.at(0, h, w) + i];
            }
        }
    });
}

} // namespace dsp
