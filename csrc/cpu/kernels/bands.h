// Winograd's method over the rows of a convolution, included by impl.h; winograd.h has the formulas. The transforms
// combine whole rows, never lanes of a vector, so any interleaving and any width works.
#pragma once

#include "winograd.h"

namespace dsp {
namespace {

constexpr float near_float = float(near_point), far_float = float(far_point);

// The inputs of the six sums from six pixels of a column.
inline void combine_rows(const V (&d)[band_sums], float* out, int64_t pitch) {
    constexpr float near = float(square_near), far = float(square_far);
    const V near_even = d[4] - far * d[2], near_odd = d[3] - far * d[1];
    const V far_even = d[4] - near * d[2], far_odd = d[3] - near * d[1];
    store(out, near_even + near_float * near_odd);
    store(out + pitch, near_even - near_float * near_odd);
    store(out + 2 * pitch, far_even + far_float * far_odd);
    store(out + 3 * pitch, far_even - far_float * far_odd);
    store(out + 4 * pitch, d[4] - (near + far) * d[2] + d[0]);
    store(out + 5 * pitch, d[5] - (near + far) * d[3] + d[1]);
}

// The four rows from the six sums.
inline void separate_rows(const V (&sum)[band_sums], V (&y)[band_rows], V bias) {
    constexpr float near = float(square_near), far = float(square_far);
    constexpr float near_cube = near * near_float, far_cube = far * far_float;
    const V even = sum[0] + sum[1], odd = sum[0] - sum[1];
    const V far_even = sum[2] + sum[3], far_odd = sum[2] - sum[3];
    y[0] = even + far_even + (sum[4] + bias);
    y[1] = near_float * odd + (far_float * far_odd + bias);
    y[2] = near * even + (far * far_even + bias);
    y[3] = near_cube * odd + far_cube * far_odd + (sum[5] + bias);
}

void band_input(const BandInput& call) {
    for (int64_t v = 0; v < call.vectors; ++v) {
        V d[band_sums];
        UNROLLED(i, band_sums) d[i] = load(call.row[i] + v * L);
        combine_rows(d, call.out + v * L, call.pitch);
    }
}

void patch_input(const BandInput& call) {
    constexpr int first[column_sums] = {1, 2, 0, 3}, second[column_sums] = {2, 1, 2, 1};
    const int64_t images = call.images;
    for (int64_t v = 0; v < call.vectors; ++v) {
        const int64_t at = call.at[v];
        UNROLLED(u, column_sums) {
            V d[band_sums];
            UNROLLED(i, band_sums) {
                const float* const row = call.row[i] + at;
                const V a = load(row + first[u] * images), b = load(row + second[u] * images);
                d[i] = u == 0 ? a + b : a - b;
            }
            combine_rows(d, call.out + u * call.pitch + v * L, column_sums * call.pitch);
        }
    }
}

// The lower half of the lanes from `lower` on, the upper half from `upper` on.
inline V load_halves(const float* lower, const float* upper) {
    M is_lower;
    for (int l = 0; l < L; ++l) is_lower[l] = l < L / 2 ? -1 : 0;
    return is_lower ? load(lower) : load(upper - L / 2);
}

// Each row is loaded and combined once, and moved for each tap: unaligned loads for each took twice as long.
void stacked_input(const BandInput& call) {
    alignas(64) float lower[(band_sums + 1) * L], room[L / 2 + (band_sums + 1) * L];
    float* const upper = room + L / 2; // load_halves() reads before it
    V d[band_sums];
    UNROLLED(i, band_sums) d[i] = load(call.row[i]);
    combine_rows(d, lower, L);
    UNROLLED(i, band_sums) d[i] = load(call.upper[i]);
    combine_rows(d, upper, L);
    for (int tap = 0; tap < call.vectors; ++tap) {
        const int move = tap * call.images;
        float* const out = call.out + tap * call.copy;
#if defined(__clang__) // has no shuffle by a variable
        UNROLLED(s, band_sums) store(out + s * call.pitch, load_halves(lower + s * L + move, upper + s * L + move));
#else
        M from;
        for (int l = 0; l < L; ++l) from[l] = l < L / 2 ? l : l + L / 2;
        from += move;
        UNROLLED(s, band_sums)
            store(out + s * call.pitch, __builtin_shuffle(load(lower + s * L), load(upper + s * L), from));
#endif
    }
}

// One of the six (or 24) sums of a tile.
template <int K, int P>
inline __attribute__((always_inline)) void sum_band(V (&sum)[K][P], const float* x, const BandCall& call,
                                                    const float* w) {
    V acc[K][P];
    UNROLLED(k, K) UNROLLED(p, P) acc[k][p] = V{};
    each_term<K>(call.off, call.count, w, [&](int64_t o, const float* weights) __attribute__((always_inline)) {
        V in[P];
        UNROLLED(p, P) in[p] = load(x + o + p * L);
        multiply_add<K, P>(acc, in, weights);
    });
    UNROLLED(k, K) UNROLLED(p, P) sum[k][p] = acc[k][p];
}

// Copies `count` floats; count < L.
inline void copy_some(float* y, const float* rest, int count) {
    int done = 0;
#pragma GCC unroll 4
    for (int size = L / 2; size >= 1; size /= 2)
        if (count & size) {
            __builtin_memcpy(y + done, rest + done, size * sizeof(float));
            done += size;
        }
}

__attribute__((noinline)) V activate_late(V v, Act act) { return activate(v, act); }

// Residual, activation and store of a vector of pixels. Copies what it needs of a call, because a store through a
// vector pointer may alias anything in memory. whole: every lane of every vector is a pixel.
template <bool whole>
struct Finish {
    const Bounds bounds;
    const Act act;
    const bool late;
    const int row;
    explicit Finish(const BandCall& call) : bounds(call.act), act(call.act), late(is_late(call.act)), row(call.row) {}
    // at: displacement in the row
    inline __attribute__((always_inline)) void operator()(float* y, const float* add, int at, V v) const {
        if (add) v += load(add + at);
        v = bounds(v);
        if (late) v = activate_late(v, act);
        if (whole || at + L <= row)
            store(y + at, v);
        else if (at < row) { // behind it are pad columns, or the next row, which another thread may be writing
            float rest[L];
            store(rest, v);
            copy_some(y + at, rest, row - at);
        }
    }
};

// The rows of a band from its sums, [band_sums][filters][vectors]; in patches there are column_sums of each.
template <int P, bool whole, bool patches>
__attribute__((noinline)) void finish_band(const V* sums, int filters, const BandCall& call) {
    constexpr int columns = patches ? patch_columns : 1;
    const Finish<whole> finish(call);
    const int rows = call.rows, next = filters * P, second = call.second;
    const int64_t pitch = call.y_pitch;
    int at[P];
    UNROLLED(p, P) at[p] = call.at[p];
    for (int k = 0; k < filters; ++k) {
        float* const plane = call.y + call.y_plane[k];
        const float* const add = call.add ? call.add + call.add_plane[k] : nullptr;
        const V bias = V{} + call.bias[k];
        for (int p = 0; p < P; ++p, ++sums) UNROLLED(column, columns) {
            V sum[band_sums], y[band_rows];
            UNROLLED(s, band_sums) {
                const V* const of = sums + s * (patches ? column_sums : 1) * next;
                sum[s] = !patches ? of[0] : column ? of[0] - of[next] + of[3 * next] : of[0] + of[next] + of[2 * next];
            }
            separate_rows(sum, y, bias);
            UNROLLED(row, band_rows) {
                if (row >= rows) break;
                finish(plane + row * pitch, add ? add + row * pitch : nullptr, at[p] + column * second, y[row]);
            }
        }
    }
}

// The rows of the two bands of each vector; the halves of a vector lie in different rows.
template <int P>
__attribute__((noinline)) void finish_stacked(const V* sums, int filters, const BandCall& call) {
    const Bounds bounds(call.act);
    const bool late = is_late(call.act);
    const int rows = call.rows, row = call.row;
    const int64_t pitch = call.y_pitch, next = filters * P;
    for (int k = 0; k < filters; ++k) {
        const V bias = V{} + call.bias[k];
        for (int p = 0; p < P; ++p, ++sums) {
            V sum[band_sums], y[band_rows];
            UNROLLED(s, band_sums) sum[s] = sums[s * next];
            separate_rows(sum, y, bias);
            UNROLLED(i, band_rows) {
                const int first = 2 * p * band_rows + i, left = rows - first;
                if (left <= 0) break;
                const bool both = left > band_rows;
                const int64_t at = first * pitch, upper = both ? band_rows * pitch : 0;
                V v = y[i];
                if (call.add) {
                    const float* const add = call.add + call.add_plane[k] + at;
                    v += load_halves(add, add + upper);
                }
                v = bounds(v);
                if (late) v = activate_late(v, call.act);
                float halves[L];
                store(halves, v);
                float* const to = call.y + call.y_plane[k] + at;
                copy_some(to, halves, row);
                if (both) copy_some(to + upper, halves + L / 2, row);
            }
        }
    }
}

template <int K, int P>
void band_tile(const BandCall& call) {
    // One sum at a time fills the registers as a plain tile does; the others stay in the first-level cache.
    V sums[patch_sums][K][P];
    const int count = call.second ? patch_sums : band_sums;
    for (int s = 0; s < count; ++s) sum_band<K, P>(sums[s], call.x + s * call.pitch, call, call.w + s * call.count * K);
    const bool whole = call.at[P - 1] + call.second + L <= call.row;
    V* const first = &sums[0][0][0];
    if (call.stacked) return finish_stacked<P>(first, K, call);
    if (call.second)
        whole ? finish_band<P, true, true>(first, K, call) : finish_band<P, false, true>(first, K, call);
    else
        whole ? finish_band<P, true, false>(first, K, call) : finish_band<P, false, false>(first, K, call);
}

} // namespace
} // namespace dsp
