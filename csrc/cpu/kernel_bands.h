// Winograd's method over the rows of a convolution, a part of kernel_impl.h; winograd.h has the formulas.
// A vector never meets a transform: these combine whole rows, so any interleaving and any width works.
#pragma once

#include "winograd.h"

namespace dsp {
namespace {

// Combinations in the order of the sums: of the points +-1 (two rows) or +-near and +-far (four), then of 0, infinity.
template <int R>
void band_input(const BandInput& call) {
    for (int64_t v = 0; v < call.vectors; ++v) {
        V d[R + 2];
#pragma GCC unroll 6
        for (int i = 0; i < R + 2; ++i) d[i] = load(call.row[i] + v * L);
        float* out = call.out + v * L;
        const int64_t pitch = call.pitch;
        if constexpr (R == 2) {
            store(out, d[2] + d[1]);
            store(out + pitch, d[2] - d[1]);
            store(out + 2 * pitch, d[2] - d[0]);
            store(out + 3 * pitch, d[3] - d[1]);
        } else {
            const V near_even = d[4] - square_far * d[2], near_odd = d[3] - square_far * d[1];
            const V far_even = d[4] - square_near * d[2], far_odd = d[3] - square_near * d[1];
            store(out, near_even + near_point * near_odd);
            store(out + pitch, near_even - near_point * near_odd);
            store(out + 2 * pitch, far_even + far_point * far_odd);
            store(out + 3 * pitch, far_even - far_point * far_odd);
            store(out + 4 * pitch, d[4] - (square_near + square_far) * d[2] + d[0]);
            store(out + 5 * pitch, d[5] - (square_near + square_far) * d[3] + d[1]);
        }
    }
}

template <int K, int P>
inline __attribute__((always_inline)) void add_half(V (&acc)[K][P], const float* x, const float* w) {
    V in[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) in[p] = load(x + p * L);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[k][p] += w[k] * in[p];
}

// Adds the two sums of a pair to a and b.
template <int K, int P>
inline __attribute__((always_inline)) void add_sums(V (&a)[K][P], V (&b)[K][P], const BandCall& call, int pair) {
    const float* const x = call.x + 2 * pair * call.pitch;
    const float* const other = x + call.pitch;
    const float* w = call.w + int64_t(pair) * call.count * 2 * K;
    const int32_t* off = call.off;
    const int32_t* const end = off + call.count;
    for (; end - off >= 2; off += 2, w += 4 * K) {
        add_half<K, P>(a, x + off[0], w);
        add_half<K, P>(b, other + off[0], w + K);
        add_half<K, P>(a, x + off[1], w + 2 * K);
        add_half<K, P>(b, other + off[1], w + 3 * K);
    }
    if (off != end) {
        add_half<K, P>(a, x + off[0], w);
        add_half<K, P>(b, other + off[0], w + K);
    }
}

__attribute__((noinline)) V activate_late(V v, Act act) { return activate(v, act); }

// Bias, residual, activation and the store of one row of a band.
template <int K, int P>
inline __attribute__((always_inline)) void finish_row(V (&acc)[K][P], const BandCall& call, int row) {
    if (row >= call.rows) return;
    const bool late = call.act == Act::silu || call.act == Act::hardswish;
    const float infinite = __builtin_inff();
    const V low = V{} + (call.act == Act::relu || call.act == Act::relu6 ? 0.0f : -infinite);
    const V high = V{} + (call.act == Act::relu6 ? 6.0f : infinite);
    const int64_t at = row * call.y_pitch;
    float* const base = call.y + at;
    const float* const add = call.add ? call.add + at : nullptr;
    const int tail = call.tail;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
        float* y = base + call.y_plane[k];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            V v = acc[k][p] + call.bias[k];
            if (add) v += load(add + call.add_plane[k] + p * L);
            v = low > v ? low : v;
            v = high < v ? high : v;
            if (late) v = activate_late(v, call.act);
            if (p + 1 < P || tail == L) {
                store(y + p * L, v);
            } else { // what follows are pad columns, or the next row, which another thread may be writing
                float rest[L];
                store(rest, v);
                for (int l = 0; l < tail; ++l) y[p * L + l] = rest[l];
            }
        }
    }
}

template <int K, int P, int R>
void band_tile(const BandCall& call) {
    V a[K][P], b[K][P];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) a[k][p] = b[k][p] = V{};
    add_sums<K, P>(a, b, call, 0);
    if constexpr (R == 2) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                const V sum = a[k][p] + b[k][p];
                b[k][p] = a[k][p] - b[k][p];
                a[k][p] = sum;
            }
    } else {
        V even[K][P], odd[K][P]; // wait in memory
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                even[k][p] = a[k][p] + b[k][p], odd[k][p] = a[k][p] - b[k][p];
                a[k][p] = b[k][p] = V{};
            }
        add_sums<K, P>(a, b, call, 1);
        V inner[K][P];
        constexpr float near_cube = square_near * near_point, far_cube = square_far * far_point;
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                const V sum = a[k][p] + b[k][p], difference = a[k][p] - b[k][p];
                inner[k][p] = near_point * odd[k][p] + far_point * difference;
                odd[k][p] = near_cube * odd[k][p] + far_cube * difference;
                a[k][p] = sum;
            }
        finish_row<K, P>(inner, call, 1);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                inner[k][p] = square_near * even[k][p] + square_far * a[k][p];
                a[k][p] += even[k][p];
                b[k][p] = odd[k][p];
            }
        finish_row<K, P>(inner, call, 2);
    }
    add_sums<K, P>(a, b, call, R / 2);
    finish_row<K, P>(a, call, 0);
    finish_row<K, P>(b, call, R - 1);
}

template <int K, int P>
void fill_bands(Kernels& table) {
    table.band_tile[0][K][P] = band_tile<K, P, 2>;
    table.band_tile[1][K][P] = band_tile<K, P, 4>;
    if constexpr (P > 1) fill_bands<K, P - 1>(table);
}

template <int K, int P>
void band_row(Kernels& table) {
    table.band_vectors[K] = P;
    fill_bands<K, P>(table);
}

// Two sums for each filter and vector fit the registers.
void make_bands(Kernels& table) {
    table.band_input[0] = band_input<2>;
    table.band_input[1] = band_input<4>;
#if DSP_WIDE
    band_row<1, 8>(table);
    band_row<2, 6>(table);
    band_row<3, 4>(table);
    band_row<4, 3>(table);
    band_row<5, 2>(table);
    band_row<6, 2>(table);
    band_row<7, 1>(table);
    band_row<8, 1>(table);
#else
    band_row<1, 6>(table);
    band_row<2, 3>(table);
    band_row<3, 2>(table);
    band_row<4, 1>(table);
    band_row<5, 1>(table);
    band_row<6, 1>(table);
#endif
}

} // namespace
} // namespace dsp
