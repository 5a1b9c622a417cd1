#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/winograd.h"
#include "tiling.h"

namespace dsp {

namespace {

// Zeroes all floats that are not pixels, from before plane `first` to before plane `last`; of some rows, those behind
// each and what is above the first and below the last. A thread clears the rows that it writes: a line of the cache
// that two threads write costs about 0.1 us each time. zero: a byte of 0.0f, or of a word of zeros.
void clear_pads(const Place& place, float* base, int first, int last, bool columns, Range rows, int zero = 0) {
    const Geometry& g = place.geometry;
    const int64_t row = int64_t(g.w) * g.interleave, pitch = g.pitch * g.interleave;
    if (first == 0 && last > 0 && rows.first == 0) std::memset(base - g.lead, zero, sizeof(float) * g.lead);
    for (int c = first; c < last; ++c) {
        float* plane = base + c * g.plane;
        const int end_row = columns && pitch > row ? std::min(rows.last, g.h - 1) : rows.first;
        if (zero)
            for (int64_t y = rows.first; y < end_row; ++y)
                std::memset(plane + y * pitch + row, zero, sizeof(float) * (pitch - row));
        else
            for (int64_t y = rows.first; y < end_row; ++y) // a few floats: memset would cost more
                for (int64_t i = row; i < pitch; ++i) plane[y * pitch + i] = 0.0f;
        if (rows.last < g.h) continue;
        const int64_t end = (g.h - 1) * pitch + row;
        const int64_t next = c + 1 < g.channels ? g.plane : g.size - g.lead - c * g.plane;
        std::memset(plane + end, zero, sizeof(float) * (next - end));
    }
}

void clear_pads(const Place& place, float* base, int first, int last, bool columns) {
    clear_pads(place, base, first, last, columns, {0, place.geometry.h});
}

// -- Between a caller's tensors and the planar layout --

constexpr int channel_block = 16; // channels_last: floats of one cache line

template <bool loads>
Op transfer(Place place, int number, std::vector<char> used) {
    const int channels = place.geometry.channels;
    const auto body = [=](int first, int last, const Context& context) { // rows
        const Images& outer = (*(loads ? context.inputs : context.outputs))[number];
        const Geometry& g = place.geometry;
        const int64_t I = g.interleave, step = outer.stride[3];
        if (loads) clear_pads(place, place.in(context), 0, channels, true, {first, last});
        // A pixel's channels are adjacent in channels_last, so a block of them is copied for a whole row at once.
        const int block = outer.stride[1] == 1 && channels > 1 ? channel_block : 1;
        const auto row = [&](int c, int count, int y, int i) {
            const int64_t first_pixel = g.at(0, y, 0) + i;
            float* const inner = place.plane(context, c) + first_pixel;
            const auto channel = [&](int k) { // only what is stored may be a view
                return loads ? inner + k * g.plane : place.plane(context, c + k) + first_pixel;
            };
            float* const outside =
                outer.base + (context.first + i) * outer.stride[0] + c * outer.stride[1] + y * outer.stride[2];
            const auto copy = [](float& in, float& out) { loads ? in = out : out = in; };
            if (i >= context.count) {
                for (int k = 0; k < count; ++k)
                    for (int64_t w = 0; w < g.w; ++w) channel(k)[w * I] = 0.0f;
            } else if (count > 1) {
                for (int64_t w = 0; w < g.w; ++w)
                    for (int k = 0; k < count; ++k) copy(channel(k)[w * I], outside[w * step + k]);
            } else if (step == 1 && I == 1) {
                std::memcpy(loads ? inner : outside, loads ? outside : inner, sizeof(float) * g.w);
            } else {
                for (int64_t w = 0; w < g.w; ++w) copy(inner[w * I], outside[w * step]);
            }
        };
        for (int c = 0; c < channels; c += block)
            for (int y = first; y < last && (block > 1 || used[c]); ++y)
                for (int i = 0; i < (loads ? I : context.count); ++i) row(c, std::min(block, channels - c), y, i);
    };
    return {loads ? "load" : "store", place.geometry.h, body};
}

} // namespace

Op load(Place to, int number, std::vector<char> used) { return transfer<true>(std::move(to), number, std::move(used)); }

Op store(Place from, int number) {
    std::vector<char> used(from.geometry.channels, 1);
    return transfer<false>(std::move(from), number, std::move(used));
}

Op split(const Kernels& kernels, Place from, Place to, Pair stride, const WordKernels* words,
         std::vector<std::pair<Phase, int>> planes) {
    // Large maps by rows, as the convolutions that read them; words of small ones by planes: a few rows cost more.
    const Geometry& g = to.geometry;
    const bool by_rows = !words || g.h * g.pitch * g.interleave >= 48 * kernels.lanes;
    const auto body = [=, &kernels](int begin_unit, int end_unit, const Context& context) {
        const Geometry &s = from.geometry, &t = to.geometry;
        const int I = s.interleave, first = by_rows ? begin_unit : 0, last = by_rows ? end_unit : t.h;
        for (int n = by_rows ? 0 : begin_unit; n < (by_rows ? int(planes.size()) : end_unit); ++n) {
            const auto& [phase, channels] = planes[n].first;
            const auto [row_phase, column_phase] = phase;
            const auto rows_at = [&, &channels = channels](int64_t at) {
                std::array<const float*, max_word> rows{};
                for (int i = 0; i < max_word && channels[i] >= 0; ++i)
                    rows[i] = from.plane(context, channels[i]) + at;
                return rows;
            };
            const int plane = planes[n].second;
            float* const target = to.plane(context, plane);
            const bool whole = words && stride[0] == 1 && stride[1] == 1;
            const int zero = words ? words->zero : 0;
            clear_pads(to, to.in(context), plane, plane + 1, !whole, {first, last}, zero);
            if (whole) { // all planes have the same pitch, and the pads between rows are zero already
                const int64_t at = s.at(0, first, 0), end = last == s.h ? (last - 1) * s.pitch + s.w : last * s.pitch;
                words->pack(rows_at(at).data(), target + at, end - first * s.pitch, 1, I);
                continue;
            }
            // The last phases have fewer rows and columns.
            const int64_t rows = (s.h - row_phase + stride[0] - 1) / stride[0];
            const int64_t columns = (s.w - column_phase + stride[1] - 1) / stride[1];
            const int64_t filled_rows = std::clamp<int64_t>(rows, first, last),
                          filled = std::clamp<int64_t>(columns, 0, t.w);
            const int64_t begin = s.at(0, row_phase, column_phase);
            const int64_t source_pitch = stride[0] * s.pitch * I, target_pitch = t.pitch * I;
            if (words && filled > 0) {
                for (int64_t y = first; y < filled_rows; ++y)
                    words->pack(rows_at(begin + y * source_pitch).data(), target + y * target_pitch, filled, stride[1],
                                I);
            } else if (filled_rows > first && filled > 0) {
                const float* const pixels = from.plane(context, channels[0]) + begin + first * source_pitch;
                kernels.thin({pixels, target + first * target_pitch, filled_rows - first, source_pitch, target_pitch,
                              filled, stride[1], I});
            }
            for (int64_t y = first; y < last; ++y) {
                const int64_t done = y < filled_rows ? filled : 0;
                if (done < t.w) std::memset(target + t.at(0, y, done), zero, sizeof(float) * (t.w - done) * I);
            }
        }
    };
    const char* const name = !words ? "split" : words->channels == 2 ? "pair" : "quad";
    return {name, by_rows ? to.geometry.h : int(planes.size()), body};
}

// -- Convolutions --

void Conv::prepare(const Part& part, const Context& context, int units, bool clear_columns) const {
    float* out = y.in(context);
    const int64_t h = y.geometry.h;
    const Range rows{int(h * part.first_vector / units), int(h * part.last_vector / units)};
    const int32_t* mask = vectors.mask_from(0, kernels.lanes);
    for (int n = part.first_absent; n < part.last_absent; ++n) {
        const int c = step.absent[n];
        if (!in_place) clear_pads(y, out, c, c + 1, !vectors.covers_pads);
        if (add) {
            const Requantize* const end = step.requantize ? &*step.requantize : nullptr;
            kernels.map({add->plane(context, c), nullptr, out + c * y.geometry.plane, vectors.at.data(), mask,
                         vectors.count(), step.act, end ? end->residual : 1.0f, 0.0f, false, 0, end});
        } else {
            for (size_t v = 0; v < vectors.at.size(); ++v)
                std::memset(out + c * y.geometry.plane + vectors.at[v], 0, sizeof(float) * kernels.lanes);
        }
    }
    if (!in_place)
        for (int t = part.first_tile; t < part.last_tile; ++t)
            for (int c : packed->tiles[t].channels) clear_pads(y, out, c, c + 1, clear_columns, rows);
}

void Conv::choose(TileCall& call, int tile) const {
    const FilterTile& of = packed->tiles[tile];
    call.w = packed->weights.data() + of.weights;
    call.bias = packed->bias.data() + of.bias;
    call.y_plane = tile_planes.data() + tile_begin[tile];
    call.add_plane = call.y_plane + of.filters;
    if (!step.requantize) return;
    call.multiplier = packed->multiplier.data() + of.bias;
    call.start = packed->start.data() + of.bias;
}

void Conv::run(const Part& part, const Context& context) const {
    float* out = y.in(context);
    const float* residual = add ? context.arena : nullptr;
    prepare(part, context, int(vectors.count()), !vectors.covers_pads);

    const auto& run_tile = step.words ? step.words->tile : kernels.tile;
    const bool integer = step.requantize.has_value();
    int32_t* const sums = reinterpret_cast<int32_t*>(context.arena + scratch + context.worker * scratch_size);
    TileCall call{};
    call.x = context.arena;
    call.y = out;
    call.ending = integer ? &*step.requantize : nullptr;
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
                int32_t* held = sums;
                for (int t = group_first; t < group_last; ++t) {
                    const FilterTile& tile = packed->tiles[t];
                    const int K = tile.filters, most = kernels.vectors[K];
                    const bool again = j > 0 && !integer; // y holds the sum so far
                    choose(call, t);
                    call.off = off[group].data() + j;
                    call.count = end - j;
                    call.w += j * K;
                    if (again) call.bias = nullptr, call.add_plane = call.y_plane;
                    call.add = again ? out : residual;
                    call.act = end == count ? step.act : Act::none;
                    call.begins = j == 0, call.ends = end == count;
                    for (int v = block; v < block_end;) {
                        const int P = pass_width(block_end - v, most);
                        call.vec = vectors.at.data() + v;
                        call.mask = vectors.mask_from(v, kernels.lanes);
                        call.sums = held;
                        run_tile[K][P](call);
                        held += K * P * kernels.lanes;
                        v += P;
                    }
                }
                j = end;
            } while (j < count);
            group_first = group_last;
        }
    }
}

void MatrixConv::run(const Part& part, const Context& context) const {
    prepare(part, context, int(vectors.count()), !vectors.covers_pads);
    if (part.first_vector == part.last_vector || part.first_tile == part.last_tile) return;
    const auto& tiles = packed->tiles;
    // Each group's rows of two vectors after the other's; the next ones are gathered meanwhile, elsewhere.
    float* const gathered = context.arena + scratch + context.worker * scratch_size;
    int turn = 0;
    const auto rows_of = [&](int vector, int tile) -> MatrixRows {
        const int group = tiles[tile].group;
        turn = !turn;
        return {context.arena,   off[group].data(), int64_t(off[group].size()),
                height[group],   matrices[group],   row_step[group],
                vectors.at.data() + vector, std::min(matrix_vectors, part.last_vector - vector),
                gathered + turn * scratch_size / 2};
    };
    MatrixCall call{};
    call.tile.y = y.in(context);
    call.tile.add = add ? context.arena : nullptr;
    call.tile.ending = step.requantize ? &*step.requantize : nullptr;
    call.tile.act = step.act;
    call.rows = rows_of(part.first_vector, part.first_tile);
    kernels.matrices.gather(call.rows);
    int begun = 0;
    for (int v = part.first_vector; v < part.last_vector; v += matrix_vectors) {
        call.tile.mask = vectors.mask_from(v, kernels.lanes);
        for (int t = part.first_tile; t < part.last_tile;) {
            const int group = tiles[t].group;
            int next = t;
            while (next < part.last_tile && tiles[next].group == group) ++next;
            MatrixRows others{};
            if (next < part.last_tile)
                others = rows_of(v, next);
            else if (v + matrix_vectors < part.last_vector)
                others = rows_of(v + matrix_vectors, part.first_tile);
            call.next = &others;
            if (call.rows.height != begun) kernels.matrices.begin(begun = call.rows.height);
            const int tile_count = next - t, gathers = others.step ? 0 : others.matrices;
            for (int i = 0; t < next; ++t, ++i) {
                choose(call.tile, t);
                call.first_next = gathers * i / tile_count, call.last_next = gathers * (i + 1) / tile_count;
                call.filters = tiles[t].filters;
                step.words->matrix[(call.filters + 15) / 16][call.rows.vectors](call);
            }
            call.rows = others;
        }
    }
    kernels.matrices.end();
}

// The sums' inputs from a band, of all channels, from vector `column` of the output on.
void BandConv::transform(float* to, int band, int column, int columns, const Context& context) const {
    const Geometry& g = x.geometry;
    const int I = g.interleave, lanes = kernels.lanes;
    const int64_t first = (patches || stacked ? 0 : int64_t(column) * lanes) - int64_t(step.padding[1]) * I;
    const int64_t floats = int64_t(columns) * lanes + int64_t(step.kernel[1] - 1) * step.dilation[1] * I;
    for (size_t n = 0; n < used.size(); ++n) {
        const auto row = [&](int band, int i) {
            const int r = band * band_rows + i - step.padding[0];
            return r < 0 || r >= g.h ? zeros.data() + lanes : x.plane(context, used[n]) + first + r * g.pitch * I;
        };
        BandInput call{{}, to + int64_t(n) * channel, pitch, patches ? columns : (floats + lanes - 1) / lanes, I,
                       at.data() + column, {}, tap};
        if (stacked) call.vectors = step.kernel[1], call.images = step.dilation[1] * I;
        for (int v = 0; v < (stacked ? columns : 1); ++v, call.out += lanes) {
            const int lower = stacked ? 2 * (column + v) : band;
            for (int i = 0; i < band_sums; ++i) call.row[i] = row(lower, i);
            for (int i = 0; stacked && i < band_sums; ++i) call.upper[i] = row(lower + 1, i);
            kernels.band_input[patches ? 1 : stacked ? 2 : 0](call);
        }
    }
}

void BandConv::run(const Part& part, const Context& context) const {
    prepare(part, context, stacked ? 1 : (y.geometry.h + band_rows - 1) / band_rows, true);
    float* const transformed = context.arena + scratch + context.worker * scratch_size;
    const Geometry& g = y.geometry;
    const int64_t row = g.pitch * g.interleave;
    const int lanes = kernels.lanes, row_vectors = int(at.size());
    BandCall call{};
    call.pitch = pitch;
    call.y_pitch = row;
    call.second = patches ? g.interleave : 0;
    call.stacked = stacked;
    call.row = g.w * g.interleave;
    call.act = step.act;
    for (int band = part.first_vector; band < part.last_vector; ++band)
        for (int block = 0; block < row_vectors; block += block_columns) {
            const int columns = std::min(block_columns, row_vectors - block);
            transform(transformed, band, block, columns, context);
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
                        const int first_row = (stacked ? 2 * (block + v) : band) * band_rows;
                        call.rows = stacked ? g.h - first_row : std::min(band_rows, g.h - first_row);
                        call.y = y.in(context) + first_row * row;
                        call.add = add ? context.arena + first_row * row : nullptr;
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

// Clears the pads of channels and calls visit(channel, its first pixel in y).
template <typename Visit>
void each_channel(const Place& y, bool covers_pads, int first, int last, const Context& context, const Visit& visit) {
    float* const base = y.in(context);
    clear_pads(y, base, first, last, !covers_pads);
    for (int c = first; c < last; ++c) visit(c, base + c * y.geometry.plane);
}

// An operation that calls visit(channel, its first pixel in y, the vectors of y, context).
template <typename Visit>
Op by_channel(const char* name, const Kernels& kernels, const Place& y, const Visit& visit) {
    const auto body = [=, vectors = cover(y.geometry, kernels.lanes)](int first, int last, const Context& context) {
        each_channel(y, vectors.covers_pads, first, last, context,
                     [&](int c, float* out) { visit(c, out, vectors, context); });
    };
    return {name, y.geometry.channels, body};
}

// The pixels of one axis that an output pixel reads: first, first + step and so on below last; an average divides by
// the product of two sizes.
struct Span {
    int first, last, step, size;
};

std::vector<Span> spans(const Step& step, int axis, int in, int out) {
    std::vector<Span> list;
    const int kernel = step.kernel[axis], dilation = step.dilation[axis], padding = step.padding[axis];
    for (int o = 0; o < out; ++o) {
        if (step.kind == Kind::adaptive) { // PyTorch's borders: parts overlap where sizes do not divide
            const int first = int(int64_t(o) * in / out), last = int(((o + int64_t(1)) * in + out - 1) / out);
            list.push_back({first, last, 1, last - first});
            continue;
        }
        const int begin = o * step.stride[axis] - padding;
        int first = begin;
        while (first < 0) first += dilation;
        const int last = std::min(begin + (kernel - 1) * dilation + 1, in);
        // With the padding that it overlaps, or its pixels inside the map; averages have no dilation.
        list.push_back(
            {first, last, dilation, step.include_pad ? std::min(kernel, in + padding - begin) : last - first});
    }
    return list;
}

} // namespace

Op map(const Kernels& kernels, const Step& step, Place x, std::optional<Place> b, Place y) {
    const bool product = step.kind == Kind::product, affine = !step.scale.empty();
    const Requantize* const end = step.requantize ? &*step.requantize : nullptr;
    const int period = product && b->geometry.h * b->geometry.w == 1 ? y.geometry.interleave : 0;
    const char* const name = product ? "product" : "map";
    return by_channel(name, kernels, y, [=, &kernels, &step](int c, float* out, const Vectors& v, const Context& at) {
        const float* other = b ? b->plane(at, c) : nullptr;
        float pattern[32]; // the period and the lanes are at most 16 each
        if (period) {
            for (int i = 0; i < 32; ++i) pattern[i] = other[i % period];
            other = pattern;
        }
        kernels.map({x.plane(at, c), other, out, v.at.data(), v.mask_from(0, kernels.lanes), v.count(), step.act,
                     end ? end->multiplier[0] : affine ? step.scale[c] : 1.0f, affine ? step.shift[c] : 0.0f, product,
                     period, end});
    });
}

namespace {

// What a sum of `pixels` is multiplied by for their mean.
float mean_factor(const Requantize* end, int pixels) {
    return end ? float(double(end->multiplier[0]) / pixels) : 1.0f / float(pixels);
}

} // namespace

Op fast_pool(const Kernels& kernels, const Step& step, Place x, Place y, std::vector<int32_t> off) {
    const bool average = step.average;
    const Requantize* const end = step.requantize ? &*step.requantize : nullptr;
    const float scale = mean_factor(end, step.divisor ? step.divisor : step.kernel[0] * step.kernel[1]);
    return by_channel("pool", kernels, y, [=, &kernels](int c, float* out, const Vectors& v, const Context& at) {
        kernels.pool({x.plane(at, c), off.data(), int64_t(off.size()), out, v.at.data(), v.mask_from(0, kernels.lanes),
                      v.count(), average, scale, end});
    });
}

namespace {

// Sum: double where sums of integers may not be exact in float.
template <typename Sum>
Op slow_pool_in(const Step& step, Place x, Place y) {
    const Requantize* const end = step.requantize ? &*step.requantize : nullptr;
    const int channels = y.geometry.channels;
    const Geometry s = x.geometry, t = y.geometry;
    const auto rows = spans(step, 0, s.h, t.h), columns = spans(step, 1, s.w, t.w);
    const auto body = [=, &step](int first, int last, const Context& context) {
        const int I = s.interleave;
        each_channel(y, false, first, last, context, [&](int c, float* plane) {
            for (int oy = 0; oy < t.h; ++oy)
                for (int ox = 0; ox < t.w; ++ox) {
                    const Span &row = rows[oy], &column = columns[ox];
                    // Sixteen running results; I divides 16, so each belongs to one image.
                    Sum result[16];
                    std::fill(result, result + 16, step.average ? Sum(0) : -std::numeric_limits<Sum>::infinity());
                    for (int iy = row.first; iy < row.last; iy += row.step) {
                        const float* pixel = x.plane(context, c) + s.at(0, iy, column.first);
                        if (!step.average) {
                            for (int ix = column.first; ix < column.last; ix += column.step, pixel += column.step * I)
                                for (int i = 0; i < I; ++i) // a NaN wins and stays, as in PyTorch
                                    if (!(pixel[i] <= result[i]) && result[i] == result[i]) result[i] = pixel[i];
                            continue;
                        }
                        int64_t left = int64_t(column.last - column.first) * I;
                        for (; left >= 16; left -= 16, pixel += 16)
                            for (int l = 0; l < 16; ++l) result[l] += pixel[l];
                        for (int l = 0; l < left; ++l) result[l] += pixel[l];
                    }
                    float* out = plane + t.at(0, oy, ox);
                    const float scale = mean_factor(end, step.divisor ? step.divisor : row.size * column.size);
                    for (int i = 0; i < I; ++i) {
                        Sum sum = result[i];
                        for (int l = i + I; step.average && l < 16; l += I) sum += result[l];
                        out[i] = float(sum);
                        if (step.average) out[i] *= scale;
                        if (!end) continue;
                        out[i] = std::clamp(out[i], end->low, end->high);
                        if (end->round) out[i] = std::nearbyint(out[i]);
                    }
                }
        });
    };
    return {step.kind == Kind::pool ? "slow pool" : t.h * t.w == 1 ? "mean" : "adaptive", channels, body};
}

} // namespace

Op slow_pool(const Step& step, Place x, Place y) {
    return (step.requantize ? slow_pool_in<double> : slow_pool_in<float>)(step, std::move(x), std::move(y));
}

Op resize(const Step& step, Place x, Place y) {
    const auto body = [=, &step](int first, int last, const Context& context) {
        const Geometry &s = x.geometry, &t = y.geometry;
        const int I = s.interleave, factor = step.factor, left = step.pads[2];
        each_channel(y, false, first, last, context, [&](int c, float* plane) {
            for (int row = 0; row < t.h; ++row) {
                float* const out = plane + t.at(0, row, 0);
                std::fill(out, out + int64_t(t.w) * I, step.value);
                const int from = row - step.pads[0];
                for (int k = 0; k < factor && from >= 0 && from < s.h * factor; ++k) {
                    const int channel = step.shuffle ? (c * factor + from % factor) * factor + k : c;
                    const float* const pixels = x.plane(context, channel) + s.at(0, from / factor, 0);
                    for (int column = 0; column < s.w; ++column) {
                        const int to = column * factor + k + left;
                        if (to >= 0 && to < t.w) std::copy_n(pixels + int64_t(column) * I, I, out + int64_t(to) * I);
                    }
                }
            }
        });
    };
    return {"resize", y.geometry.channels, body};
}

namespace {

// An output row or column: (1 - weight) * first + weight * second, or zero if first is -1.
struct Blend {
    int first, second;
    float weight;
};

// PyTorch's rules, in its float arithmetic.
std::vector<Blend> blends(Fit fit, int in, int out) {
    std::vector<Blend> list;
    const bool corners = fit == Fit::corners;
    const float scale = corners ? (out > 1 ? float(in - 1) / float(out - 1) : 0.0f) : float(in) / float(out);
    const int gap = out - in, before = fit == Fit::pad_end ? 0 : gap >= 0 ? gap / 2 : -((1 - gap) / 2);
    for (int o = 0; o < out; ++o) {
        if (fit == Fit::pad_end || fit == Fit::pad_around) {
            const int from = o - before;
            list.push_back({from < in ? std::max(from, -1) : -1, 0, 0.0f});
            continue;
        }
        const bool nearest = fit == Fit::nearest;
        const float at = nearest || corners ? float(o) * scale : std::max(scale * (float(o) + 0.5f) - 0.5f, 0.0f);
        const int first = std::min(int(at), in - 1);
        list.push_back({first, std::min(first + 1, in - 1), at - float(first)});
    }
    return list;
}

} // namespace

Op fit(const Step& step, Place x, Place y) {
    const Geometry s = x.geometry, t = y.geometry;
    const bool blended = step.fit == Fit::bilinear || step.fit == Fit::corners;
    const auto rows = blends(step.fit, s.h, t.h), columns = blends(step.fit, s.w, t.w);
    const auto body = [=](int first, int last, const Context& context) {
        const int64_t I = s.interleave;
        each_channel(y, false, first, last, context, [&](int c, float* plane) {
            for (int oy = 0; oy < t.h; ++oy) {
                const Blend& of = rows[oy];
                float* out = plane + t.at(0, oy, 0);
                if (of.first < 0) {
                    std::fill(out, out + t.w * I, 0.0f);
                    continue;
                }
                const float* const in = x.plane(context, c) + s.at(0, of.first, 0);
                const float* const below = x.plane(context, c) + s.at(0, of.second, 0);
                for (const Blend& column : columns) {
                    const int64_t one = column.first * I, two = column.second * I;
                    const auto blend = [&](int64_t i) { return in[i] + of.weight * (below[i] - in[i]); };
                    for (int64_t i = 0; i < I; ++i, ++out)
                        *out = column.first < 0 ? 0.0f
                               : !blended       ? in[one + i]
                                                : blend(one + i) + column.weight * (blend(two + i) - blend(one + i));
                }
            }
        });
    };
    return {"fit", t.channels, body};
}

Op norm(const Kernels& kernels, const Step& step, Place x, Place y) {
    const Geometry g = x.geometry;
    const int each = g.channels / step.number;
    const auto body = [=, &kernels, &step, v = cover(y.geometry, kernels.lanes)](int first, int last,
                                                                                 const Context& context) {
        const int I = g.interleave;
        const double count = double(each) * g.h * g.w;
        for (int group = first; group < last; ++group) {
            float center[32]{}, scale[32], shift[32]; // by image, see NormCall; the rounding of `center` is in `shift`
            const auto mean_of = [&](bool squared, double* mean) {
                std::fill(mean, mean + I, 0.0);
                for (int c = group * each; c < (group + 1) * each; ++c)
                    for (int64_t begin = 0; begin < v.count(); begin += 256) { // longer sums would lose digits
                        float sums[32]{};
                        const int64_t vectors = std::min<int64_t>(256, v.count() - begin);
                        kernels.norm({x.plane(context, c), nullptr, v.at.data() + begin,
                                      v.mask_from(begin, kernels.lanes), vectors, I, center, nullptr, nullptr,
                                      Act::none, squared, sums});
                        for (int l = 0; l < 32; ++l) mean[l % I] += double(sums[l]) / count;
                    }
            };
            double mean[16], variance[16];
            // Differences from any pixel: the mean of equal numbers is exact, which 1 / sqrt(epsilon) multiplies.
            for (int l = 0; l < 32; ++l) center[l] = x.plane(context, group * each)[l % I];
            mean_of(false, mean);
            for (int i = 0; i < I; ++i) mean[i] += double(center[i]);
            for (int l = 0; l < 32; ++l) center[l] = float(mean[l % I]);
            mean_of(true, variance);
            each_channel(y, v.covers_pads, group * each, (group + 1) * each, context, [&](int c, float* out) {
                for (int l = 0; l < 32; ++l) {
                    scale[l] = float(step.scale[c] / std::sqrt(variance[l % I] + double(step.value)));
                    shift[l] = float(step.shift[c] - (mean[l % I] - double(center[l])) * double(scale[l]));
                }
                kernels.norm({x.plane(context, c), out, v.at.data(), v.mask_from(0, kernels.lanes), v.count(), I,
                              center, scale, shift, step.act, false, nullptr});
            });
        }
    };
    return {"norm", step.number, body};
}

Op linear(const Kernels& kernels, const Step& step, Place x, Place y) {
    const Geometry s = x.geometry, t = y.geometry;
    std::vector<int32_t> off;
    for (int c = 0; c < s.channels; ++c)
        for (int h = 0; h < s.h; ++h)
            for (int w = 0; w < s.w; ++w) off.push_back(int32_t(x.planes[c] + s.at(0, h, w)));
    constexpr int unit = 64; // outputs: whole vectors
    const auto body = [=, &kernels, &step](int first, int last, const Context& context) {
        first *= unit, last = std::min(last * unit, t.channels);
        if (first >= last) return;
        clear_pads(y, y.in(context), first, last, true);
        kernels.linear({context.arena, off.data(), int64_t(off.size()), t.interleave, step.weights.data(),
                        round_up(t.channels, 16), step.bias.data(), y.in(context), t.plane, first, last, step.act,
                        step.requantize ? &*step.requantize : nullptr,
                        step.requantize ? step.requantize->multiplier.data() : nullptr});
    };
    return {"linear", (t.channels + unit - 1) / unit, body};
}

} // namespace dsp
