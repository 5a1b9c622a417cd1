#include "ops.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/winograd.h"
#include "tiling.h"

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
            for (int64_t y = 0; y + 1 < g.h; ++y) // a few floats: memset would cost more
                for (int64_t i = row; i < pitch; ++i) plane[y * pitch + i] = 0.0f;
        const int64_t end = (g.h - 1) * pitch + row;
        const int64_t next = c + 1 < g.channels ? g.plane : g.size - g.lead - c * g.plane;
        std::memset(plane + end, 0, sizeof(float) * (next - end));
    }
}

// -- Between a caller's tensors and the planar layout --

namespace {

constexpr int channel_block = 16; // channels_last: floats of one cache line

// Rows [first, last) of channels of one image; visit(c, y, count of channels) does one piece.
template <typename Visit>
void by_blocks(bool channels_last, int first, int last, int rows, const Visit& visit) {
    // A pixel's channels are adjacent in channels_last, so a block of them is copied for a whole row at once.
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

// Without a stride both planes have the same pitch, and the pads between rows are zero already.
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
        const float* source = from.plane(context, plane.channel) + s.at(0, plane.row_phase, plane.column_phase);
        const int64_t other = plane.other < 0 ? 0 : from.planes[plane.other] - from.planes[plane.channel];
        const int64_t source_pitch = stride[0] * s.pitch * I, target_pitch = t.pitch * I;
        float* const target = base + t.at(plane.to, 0, 0);
        if (pairs && filled > 0) {
            for (int64_t y = 0; y < filled_rows; ++y) {
                const float* row = source + y * source_pitch;
                pairs->pair(row, plane.other < 0 ? nullptr : row + other, target + y * target_pitch, filled, stride[1],
                            I);
            }
        } else if (filled_rows > 0 && filled > 0) {
            kernels.thin({source, target, filled_rows, source_pitch, target_pitch, filled, stride[1], I});
        }
        for (int64_t y = 0; y < t.h; ++y) {
            const int64_t done = y < filled_rows ? std::max<int64_t>(filled, 0) : 0;
            if (done < t.w) std::memset(base + t.at(plane.to, y, done), 0, sizeof(float) * (t.w - done) * I);
        }
    }
}

// -- Convolutions --

void ConvOp::prepare(const Chunk& part, const Context& context, bool clear_columns) const {
    float* out = y.in(context);
    const int32_t* mask = vectors.mask_from(0, kernels.lanes);
    for (int n = part.first_absent; n < part.last_absent; ++n) {
        const int c = step.absent[n];
        if (!in_place) clear_pads(y, out, c, c + 1, !vectors.covers_pads);
        if (has_add) {
            kernels.map({context.arena + add.planes[c], nullptr, out + c * y.geometry.plane, 1.0f, 0.0f,
                         vectors.at.data(), mask, vectors.count(), step.act});
        } else {
            for (size_t v = 0; v < vectors.at.size(); ++v)
                std::memset(out + c * y.geometry.plane + vectors.at[v], 0, sizeof(float) * kernels.lanes);
        }
    }
    if (part.first_vector == 0 && !in_place)
        for (int t = part.first_tile; t < part.last_tile; ++t)
            for (int c : packed->tiles[t].channels) clear_pads(y, out, c, c + 1, clear_columns);
}

void ConvOp::run(int chunk, const Context& context) const {
    const Chunk& part = parts[chunk];
    float* out = y.in(context);
    const float* residual = has_add ? context.arena : nullptr;
    const int32_t* mask = vectors.mask_from(0, kernels.lanes);
    const int lanes = kernels.lanes;
    prepare(part, context, !vectors.covers_pads);

    const auto& run_tile = step.pairs ? step.pairs->tile : kernels.tile;
    TileCall call{};
    call.x = context.arena;
    call.y = out;
    for (int block = part.first_vector; block < part.last_vector; block += block_vectors) {
        const int block_end = std::min(block + block_vectors, part.last_vector);
        for (int group_first = part.first_tile; group_first < part.last_tile;) {
            const int group = packed->tiles[group_first].group;
            int group_last = group_first;
            while (group_last < part.last_tile && packed->tiles[group_last].group == group) ++group_last;
            const int64_t count = int64_t(off[group].size());
            // A wide group is summed in passes, so that the planes of one pass stay in the first-level cache while all
            // filters read them.
            int64_t j = 0;
            do {
                const int64_t end = std::min<int64_t>(j + block_terms[group], count);
                for (int t = group_first; t < group_last; ++t) {
                    const FilterTile& tile = packed->tiles[t];
                    const int K = tile.filters, most = kernels.vectors[K];
                    call.off = off[group].data() + j;
                    call.count = end - j;
                    call.w = packed->weights.data() + tile.weights + j * K;
                    call.bias = j == 0 ? packed->bias.data() + tile.bias : nullptr;
                    call.y_plane = tile_planes.data() + tile_begin[t];
                    call.add = j > 0 ? out : residual;
                    call.add_plane = j > 0 ? call.y_plane : call.y_plane + K;
                    call.act = end == count ? step.act : Act::none;
                    for (int v = block; v < block_end;) {
                        const int P = pass_width(block_end - v, most);
                        call.vec = vectors.at.data() + v;
                        call.mask = mask ? mask + int64_t(v) * lanes : nullptr;
                        run_tile[K][P](call);
                        v += P;
                    }
                }
                j = end;
            } while (j < count);
            group_first = group_last;
        }
    }
}

// The sums' inputs from a band, of all channels, from vector `column` of the output on.
void BandConvOp::transform(float* to, int band, int column, int columns, const Context& context) const {
    const Geometry& g = x.geometry;
    const int I = g.interleave, lanes = kernels.lanes;
    const int64_t first = (patches ? 0 : int64_t(column) * lanes) - int64_t(step.padding[1]) * I;
    const int64_t floats = int64_t(columns) * lanes + int64_t(step.kernel[1] - 1) * step.dilation[1] * I;
    for (size_t n = 0; n < used.size(); ++n) {
        const float* row[band_sums];
        for (int i = 0; i < band_sums; ++i) {
            const int r = band * band_rows + i - step.padding[0];
            row[i] = r < 0 || r >= g.h ? zeros.data() : x.plane(context, used[n]) + first + r * g.pitch * I;
        }
        float* const out = to + int64_t(n) * channel;
        if (patches)
            kernels.patch_input(
                {{row[0], row[1], row[2], row[3], row[4], row[5]}, I, at.data() + column, out, pitch, columns});
        else
            kernels.band_input(
                {{row[0], row[1], row[2], row[3], row[4], row[5]}, out, pitch, (floats + lanes - 1) / lanes});
    }
}

void BandConvOp::run(int chunk, const Context& context) const {
    const Chunk& part = parts[chunk];
    prepare(part, context, true);
    float* const transformed = context.arena + scratch + context.worker * scratch_size;
    const Geometry& g = y.geometry;
    const int64_t row = g.pitch * g.interleave;
    const int lanes = kernels.lanes, row_vectors = int(at.size());
    BandCall call{};
    call.pitch = pitch;
    call.y_pitch = row;
    call.second = patches ? g.interleave : 0;
    call.row = g.w * g.interleave;
    call.act = step.act;
    for (int band = part.first_vector; band < part.last_vector; ++band)
        for (int block = 0; block < row_vectors; block += block_columns) {
            const int columns = std::min(block_columns, row_vectors - block);
            transform(transformed, band, block, columns, context);
            call.rows = std::min(band_rows, g.h - band * band_rows);
            const int64_t first = int64_t(band) * band_rows * row;
            call.y = y.in(context) + first;
            call.add = has_add ? context.arena + first : nullptr;
            for (int begin = 0; begin < columns; begin += sum_columns) {
                const int end = std::min(begin + sum_columns, columns);
                for (int t = part.first_tile; t < part.last_tile; ++t) {
                    const FilterTile& tile = packed->tiles[t];
                    const int K = tile.filters, most = kernels.vectors[K];
                    call.off = off[tile.group].data();
                    call.count = int64_t(off[tile.group].size());
                    call.w = packed->weights.data() + tile.weights;
                    call.bias = packed->bias.data() + tile.bias;
                    call.y_plane = tile_planes.data() + tile_begin[t];
                    call.add_plane = call.y_plane + K;
                    for (int v = begin; v < end;) {
                        const int P = pass_width(end - v, most);
                        call.x = transformed + int64_t(v) * lanes;
                        call.at = at.data() + block + v;
                        kernels.band_tile[K][P](call);
                        v += P;
                    }
                }
            }
        }
}

// -- Other operations --

namespace {

// Clears the pads of the chunk's channels and calls visit(channel, its first pixel in y).
template <typename Visit>
void each_channel(const Place& y, bool covers_pads, int chunks, int chunk, const Context& context, const Visit& visit) {
    const Range range = cut(y.geometry.channels, chunks, chunk);
    float* const base = y.in(context);
    clear_pads(y, base, range.first, range.last, !covers_pads);
    for (int c = range.first; c < range.last; ++c) visit(c, base + c * y.geometry.plane);
}

} // namespace

void MapOp::run(int chunk, const Context& context) const {
    const bool affine = !step.scale.empty();
    each_channel(y, vectors.covers_pads, chunks, chunk, context, [&](int c, float* out) {
        kernels.map({x.plane(context, c), has_b ? b.plane(context, c) : nullptr, out, affine ? step.scale[c] : 1.0f,
                     affine ? step.shift[c] : 0.0f, vectors.at.data(), vectors.mask_from(0, kernels.lanes),
                     vectors.count(), step.act});
    });
}

void ProductOp::run(int chunk, const Context& context) const {
    const bool one_pixel = b.geometry.h * b.geometry.w == 1;
    const int I = y.geometry.interleave;
    float pattern[32]; // I and the lanes are at most 16 each
    each_channel(y, vectors.covers_pads, chunks, chunk, context, [&](int c, float* out) {
        const float* factor = b.plane(context, c);
        if (one_pixel) {
            for (int i = 0; i < 32; ++i) pattern[i] = factor[i % I];
            factor = pattern;
        }
        kernels.product({x.plane(context, c), factor, out, one_pixel ? I : 0, vectors.at.data(),
                         vectors.mask_from(0, kernels.lanes), vectors.count(), act});
    });
}

void FastPoolOp::run(int chunk, const Context& context) const {
    each_channel(y, vectors.covers_pads, chunks, chunk, context, [&](int c, float* out) {
        kernels.pool({x.plane(context, c), off.data(), int64_t(off.size()), out, vectors.at.data(),
                      vectors.mask_from(0, kernels.lanes), vectors.count(), average, scale});
    });
}

void PoolOp::run(int chunk, const Context& context) const {
    const Geometry &s = x.geometry, &t = y.geometry;
    const int I = s.interleave, kh = step.kernel[0], kw = step.kernel[1];
    each_channel(y, false, chunks, chunk, context, [&](int c, float* plane) {
        for (int oy = 0; oy < t.h; ++oy)
            for (int ox = 0; ox < t.w; ++ox) {
                const int top = oy * step.stride[0] - step.padding[0];
                const int left = ox * step.stride[1] - step.padding[1];
                float sum[16];
                std::fill(sum, sum + I, step.average ? 0.0f : -std::numeric_limits<float>::infinity());
                for (int ky = 0; ky < kh; ++ky) {
                    const int iy = top + ky * step.dilation[0];
                    if (iy < 0 || iy >= s.h) continue;
                    for (int kx = 0; kx < kw; ++kx) {
                        const int ix = left + kx * step.dilation[1];
                        if (ix < 0 || ix >= s.w) continue;
                        const float* pixel = x.plane(context, c) + s.at(0, iy, ix);
                        for (int i = 0; i < I; ++i) {
                            if (step.average) sum[i] += pixel[i];
                            // A NaN wins and stays, as in PyTorch.
                            else if (!(pixel[i] <= sum[i]) && sum[i] == sum[i])
                                sum[i] = pixel[i];
                        }
                    }
                }
                float* out = plane + t.at(0, oy, ox);
                float scale = 1.0f;
                if (step.average) {
                    // The window's size with the padding it overlaps, or its pixels inside the map.
                    const int bottom = std::min(top + kh, s.h + step.padding[0]);
                    const int right = std::min(left + kw, s.w + step.padding[1]);
                    int area = (bottom - top) * (right - left);
                    if (!step.include_pad)
                        area = (std::min(bottom, s.h) - std::max(top, 0)) * (std::min(right, s.w) - std::max(left, 0));
                    scale = 1.0f / float(step.divisor ? step.divisor : area);
                }
                for (int i = 0; i < I; ++i) out[i] = sum[i] * scale;
            }
    });
}

void MeanOp::run(int chunk, const Context& context) const {
    const Geometry& s = x.geometry;
    const int I = s.interleave;
    const float scale = 1.0f / float(int64_t(s.h) * s.w);
    each_channel(y, false, chunks, chunk, context, [&](int c, float* out) {
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
        for (int i = 0; i < I; ++i) {
            float total = 0.0f;
            for (int l = i; l < 16; l += I) total += sum[l];
            out[i] = total * scale;
        }
    });
}

void AdaptiveOp::run(int chunk, const Context& context) const {
    const Geometry &s = x.geometry, &t = y.geometry;
    const int I = s.interleave;
    const auto begin = [](int64_t part, int64_t size, int64_t parts) { return part * size / parts; };
    const auto end = [](int64_t part, int64_t size, int64_t parts) { return ((part + 1) * size + parts - 1) / parts; };
    each_channel(y, false, chunks, chunk, context, [&](int c, float* plane) {
        for (int oy = 0; oy < t.h; ++oy)
            for (int ox = 0; ox < t.w; ++ox) {
                const int64_t top = begin(oy, s.h, t.h), bottom = end(oy, s.h, t.h);
                const int64_t left = begin(ox, s.w, t.w), right = end(ox, s.w, t.w);
                float sum[16] = {};
                for (int64_t iy = top; iy < bottom; ++iy)
                    for (int64_t ix = left; ix < right; ++ix)
                        for (int i = 0; i < I; ++i) sum[i] += x.plane(context, c)[s.at(0, iy, ix) + i];
                const float scale = 1.0f / float((bottom - top) * (right - left));
                for (int i = 0; i < I; ++i) plane[t.at(0, oy, ox) + i] = sum[i] * scale;
            }
    });
}

void LinearOp::run(int chunk, const Context& context) const {
    const Geometry& t = y.geometry;
    // Whole vectors of outputs per chunk.
    const Range range = cut((t.channels + 63) / 64, chunks, chunk);
    if (range.first == range.last) return;
    const int first = range.first * 64, last = std::min(range.last * 64, t.channels);
    clear_pads(y, y.in(context), first, last, true);
    kernels.linear({context.arena, off.data(), int64_t(off.size()), t.interleave, step.weights.data(),
                    round_up(t.channels, 16), step.bias.data(), y.in(context), t.plane, first, last, step.act});
}

} // namespace dsp
