#include "ops.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace dsp {

Range cut(int total, int parts, int part) {
    return {int(int64_t(total) * part / parts), int(int64_t(total) * (part + 1) / parts)};
}

void clear_pads(const Place& place, float* base, int first, int last, bool columns) {
    const Geometry& g = place.geometry;
    const int64_t row = int64_t(g.w) * g.interleave, pitch = g.pitch * g.interleave;
    if (first == 0 && last > 0) std::memset(base - g.lead, 0, sizeof(float) * g.lead);
    for (int c = first; c < last; ++c) {
        float* plane = base + c * g.plane;
        if (columns && pitch > row)
            for (int64_t y = 0; y + 1 < g.h; ++y) // a few floats: a call would cost more
                for (int64_t i = row; i < pitch; ++i) plane[y * pitch + i] = 0.0f;
        const int64_t end = (g.h - 1) * pitch + row;
        const int64_t next = c + 1 < g.channels ? g.plane : g.size - g.lead - c * g.plane;
        std::memset(plane + end, 0, sizeof(float) * (next - end));
    }
}

// Without a stride both planes have one pitch, and the pads between the rows are zeros already.
void SplitOp::pair_whole(const Plane& plane, const Context& context) const {
    const Geometry& s = from.geometry;
    clear_pads(to, to.in(context), plane.to, plane.to + 1, false);
    pairs->pair(from.plane(context, plane.channel), plane.other < 0 ? nullptr : from.plane(context, plane.other),
                to.plane(context, plane.to), (s.h - 1) * s.pitch + s.w, 1, s.interleave);
}

void SplitOp::run(int chunk, const Context& context) const {
    const Geometry &s = from.geometry, &t = to.geometry;
    const Range range = cut(int(planes.size()), chunks, chunk);
    const int I = s.interleave;
    for (int n = range.first; n < range.last; ++n) {
        const Plane& plane = planes[n];
        if (pairs && stride[0] == 1 && stride[1] == 1) {
            pair_whole(plane, context);
            continue;
        }
        float* base = to.in(context);
        clear_pads(to, base, plane.to, plane.to + 1, true);
        // The last phases have fewer rows and columns.
        const int64_t rows = (s.h - plane.row_phase + stride[0] - 1) / stride[0];
        const int64_t columns = (s.w - plane.column_phase + stride[1] - 1) / stride[1];
        const int64_t filled_rows = std::min<int64_t>(rows, t.h), filled = std::min<int64_t>(columns, t.w);
        const float* source =
            from.plane(context, plane.channel) + s.at(0, plane.row_phase, plane.column_phase);
        const int64_t other = plane.other < 0 ? 0 : from.planes[plane.other] - from.planes[plane.channel];
        const int64_t source_pitch = stride[0] * s.pitch * I, target_pitch = t.pitch * I;
        float* const target = base + t.at(plane.to, 0, 0);
        if (pairs && filled > 0) {
            for (int64_t y = 0; y < filled_rows; ++y) {
                const float* row = source + y * source_pitch;
                pairs->pair(row, plane.other < 0 ? nullptr : row + other, target + y * target_pitch, filled, stride[1], I);
            }
        } else if (filled_rows > 0 && filled > 0) {
            kernels->thin({source, target, filled_rows, source_pitch, target_pitch, filled, stride[1], I});
        }
        for (int64_t y = 0; y < t.h; ++y) {
            const int64_t done = y < filled_rows ? std::max<int64_t>(filled, 0) : 0;
            if (done < t.w) std::memset(base + t.at(plane.to, y, done), 0, sizeof(float) * (t.w - done) * I);
        }
    }
}

void MapOp::run(int chunk, const Context& context) const {
    const Range range = cut(y.geometry.channels, chunks, chunk);
    clear_pads(y, y.in(context), range.first, range.last, !vectors.covers_pads);
    for (int c = range.first; c < range.last; ++c) {
        const bool affine = !step->scale.empty();
        kernels->map({a.plane(context, c), has_b ? b.plane(context, c) : nullptr,
                      y.in(context) + c * y.geometry.plane, affine ? step->scale[c] : 1.0f,
                      affine ? step->shift[c] : 0.0f, vectors.at.data(),
                      vectors.mask.empty() ? nullptr : vectors.mask.data(), int64_t(vectors.at.size()), step->act});
    }
}

void ProductOp::run(int chunk, const Context& context) const {
    const Range range = cut(y.geometry.channels, chunks, chunk);
    clear_pads(y, y.in(context), range.first, range.last, !vectors.covers_pads);
    const int I = y.geometry.interleave;
    float pattern[32]; // I and the lanes are at most 16 each
    for (int c = range.first; c < range.last; ++c) {
        const float* factor = b.plane(context, c);
        if (one_pixel) {
            for (int i = 0; i < 32; ++i) pattern[i] = factor[i % I];
            factor = pattern;
        }
        kernels->product({a.plane(context, c), factor, y.in(context) + c * y.geometry.plane, one_pixel ? I : 0,
                          vectors.at.data(), vectors.mask.empty() ? nullptr : vectors.mask.data(),
                          int64_t(vectors.at.size()), act});
    }
}

void FastPoolOp::run(int chunk, const Context& context) const {
    const Range range = cut(y.geometry.channels, chunks, chunk);
    clear_pads(y, y.in(context), range.first, range.last, !vectors.covers_pads);
    for (int c = range.first; c < range.last; ++c)
        kernels->pool({x.plane(context, c), off.data(), int64_t(off.size()),
                       y.in(context) + c * y.geometry.plane, vectors.at.data(),
                       vectors.mask.empty() ? nullptr : vectors.mask.data(), int64_t(vectors.at.size()), average,
                       scale});
}

void PoolOp::run(int chunk, const Context& context) const {
    const Geometry &s = x.geometry, &t = y.geometry;
    const Range range = cut(t.channels, chunks, chunk);
    const int I = s.interleave;
    clear_pads(y, y.in(context), range.first, range.last, true);
    const int kh = step->kernel[0], kw = step->kernel[1];
    for (int c = range.first; c < range.last; ++c)
        for (int oy = 0; oy < t.h; ++oy)
            for (int ox = 0; ox < t.w; ++ox) {
                const int top = oy * step->stride[0] - step->padding[0];
                const int left = ox * step->stride[1] - step->padding[1];
                float sum[16];
                std::fill(sum, sum + I, step->average ? 0.0f : -std::numeric_limits<float>::infinity());
                for (int ky = 0; ky < kh; ++ky) {
                    const int iy = top + ky * step->dilation[0];
                    if (iy < 0 || iy >= s.h) continue;
                    for (int kx = 0; kx < kw; ++kx) {
                        const int ix = left + kx * step->dilation[1];
                        if (ix < 0 || ix >= s.w) continue;
                        const float* pixel = x.plane(context, c) + s.at(0, iy, ix);
                        for (int i = 0; i < I; ++i) {
                            if (step->average) sum[i] += pixel[i];
                            // A NaN wins and stays, as in PyTorch.
                            else if (!(pixel[i] <= sum[i]) && sum[i] == sum[i]) sum[i] = pixel[i];
                        }
                    }
                }
                float* out = y.in(context) + t.at(c, oy, ox);
                float scale = 1.0f;
                if (step->average) {
                    // The window's size with the padding it touches, or its real pixels only.
                    const int bottom = std::min(top + kh, s.h + step->padding[0]);
                    const int right = std::min(left + kw, s.w + step->padding[1]);
                    int area = (bottom - top) * (right - left);
                    if (!step->include_pad)
                        area = (std::min(bottom, s.h) - std::max(top, 0)) * (std::min(right, s.w) - std::max(left, 0));
                    scale = 1.0f / float(step->divisor ? step->divisor : area);
                }
                for (int i = 0; i < I; ++i) out[i] = sum[i] * scale;
            }
}

void MeanOp::run(int chunk, const Context& context) const {
    const Geometry& s = x.geometry;
    const Range range = cut(s.channels, chunks, chunk);
    const int I = s.interleave;
    const float scale = 1.0f / float(int64_t(s.h) * s.w);
    clear_pads(y, y.in(context), range.first, range.last, true);
    for (int c = range.first; c < range.last; ++c) {
        // Sixteen running sums; I divides 16, so each belongs to one image.
        float sum[16] = {};
        for (int64_t r = 0; r < s.h; ++r) {
            const float* row = x.plane(context, c) + s.at(0, r, 0);
            const int64_t length = int64_t(s.w) * I;
            int64_t p = 0;
            for (; p + 16 <= length; p += 16)
                for (int l = 0; l < 16; ++l) sum[l] += row[p + l];
            for (int l = 0; p + l < length; ++l) sum[l] += row[p + l];
        }
        float* out = y.in(context) + c * y.geometry.plane;
        for (int i = 0; i < I; ++i) {
            float total = 0.0f;
            for (int l = i; l < 16; l += I) total += sum[l];
            out[i] = total * scale;
        }
    }
}

void AdaptiveOp::run(int chunk, const Context& context) const {
    const Geometry &s = x.geometry, &t = y.geometry;
    const Range range = cut(t.channels, chunks, chunk);
    const int I = s.interleave;
    clear_pads(y, y.in(context), range.first, range.last, true);
    const auto begin = [](int64_t part, int64_t size, int64_t parts) { return part * size / parts; };
    const auto end = [](int64_t part, int64_t size, int64_t parts) { return ((part + 1) * size + parts - 1) / parts; };
    for (int c = range.first; c < range.last; ++c)
        for (int oy = 0; oy < t.h; ++oy)
            for (int ox = 0; ox < t.w; ++ox) {
                const int64_t top = begin(oy, s.h, t.h), bottom = end(oy, s.h, t.h);
                const int64_t left = begin(ox, s.w, t.w), right = end(ox, s.w, t.w);
                float sum[16] = {};
                for (int64_t iy = top; iy < bottom; ++iy)
                    for (int64_t ix = left; ix < right; ++ix)
                        for (int i = 0; i < I; ++i) sum[i] += x.plane(context, c)[s.at(0, iy, ix) + i];
                const float scale = 1.0f / float((bottom - top) * (right - left));
                for (int i = 0; i < I; ++i) y.in(context)[t.at(c, oy, ox) + i] = sum[i] * scale;
            }
}

void LinearOp::run(int chunk, const Context& context) const {
    const Geometry& t = y.geometry;
    // Whole vectors of outputs per chunk.
    const Range range = cut((t.channels + 63) / 64, chunks, chunk);
    if (range.first == range.last) return;
    const int first = range.first * 64, last = std::min(range.last * 64, t.channels);
    clear_pads(y, y.in(context), first, last, true);
    kernels->linear({context.arena, off.data(), int64_t(off.size()), t.interleave, step->weights.data(),
                     (int64_t(t.channels) + 15) / 16 * 16, step->bias.data(), y.in(context), t.plane, first, last,
                     step->act});
}

} // namespace dsp
