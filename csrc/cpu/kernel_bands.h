// Winograd's method over the rows of a convolution, a part of kernel_impl.h; winograd.h has the formulas.
// A vector never meets a transform: these combine whole rows, so any interleaving and any width works.
#pragma once

#include "winograd.h"

namespace dsp {
namespace {

constexpr float near_float = float(near_point), far_float = float(far_point);

// Combinations of the six rows of a band in the order of the sums.
void band_input(const BandInput& call) {
    constexpr float near = float(square_near), far = float(square_far);
    const int64_t pitch = call.pitch;
    for (int64_t v = 0; v < call.vectors; ++v) {
        V d[band_sums];
#pragma GCC unroll 6
        for (int i = 0; i < band_sums; ++i) d[i] = load(call.row[i] + v * L);
        float* out = call.out + v * L;
        const V near_even = d[4] - far * d[2], near_odd = d[3] - far * d[1];
        const V far_even = d[4] - near * d[2], far_odd = d[3] - near * d[1];
        store(out, near_even + near_float * near_odd);
        store(out + pitch, near_even - near_float * near_odd);
        store(out + 2 * pitch, far_even + far_float * far_odd);
        store(out + 3 * pitch, far_even - far_float * far_odd);
        store(out + 4 * pitch, d[4] - (near + far) * d[2] + d[0]);
        store(out + 5 * pitch, d[5] - (near + far) * d[3] + d[1]);
    }
}

template <int K, int P>
inline __attribute__((always_inline)) void add_half(V (&acc)[K][P], const float* x, const float* w) {
    V in[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) in[p] = load(x + p * L);
    multiply_add<K, P>(acc, in, w);
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

// The first `count` lanes; fewer than all.
inline void store_some(float* y, V v, int count) {
    float rest[L];
    store(rest, v);
    int done = 0;
#pragma GCC unroll 4
    for (int size = L / 2; size >= 1; size /= 2)
        if (count & size) {
            __builtin_memcpy(y + done, rest + done, size * sizeof(float));
            done += size;
        }
}

// Bias, residual, activation and the store of one row of a band.
template <int K, int P>
inline __attribute__((always_inline)) void finish_row(V (&acc)[K][P], const BandCall& call, int row) {
    if (row >= call.rows) return;
    const bool late = is_late(call.act);
    const Bounds bounds(call.act);
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
            v = bounds(v);
            if (late) v = activate_late(v, call.act);
            if (p + 1 < P || tail == L) {
                store(y + p * L, v);
            } else { // what follows are pad columns, or the next row, which another thread may be writing
                store_some(y + p * L, v, tail);
            }
        }
    }
}

template <int K, int P>
void band_tile(const BandCall& call) {
    constexpr float near = float(square_near), far = float(square_far);
    constexpr float near_cube = near * near_float, far_cube = far * far_float;
    V a[K][P], b[K][P], even[K][P], odd[K][P], inner[K][P]; // the last three wait in memory
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) a[k][p] = b[k][p] = V{};
    add_sums<K, P>(a, b, call, 0);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            even[k][p] = a[k][p] + b[k][p], odd[k][p] = a[k][p] - b[k][p];
            a[k][p] = b[k][p] = V{};
        }
    add_sums<K, P>(a, b, call, 1);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            const V sum = a[k][p] + b[k][p], difference = a[k][p] - b[k][p];
            inner[k][p] = near_float * odd[k][p] + far_float * difference;
            odd[k][p] = near_cube * odd[k][p] + far_cube * difference;
            a[k][p] = sum;
        }
    finish_row<K, P>(inner, call, 1);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            inner[k][p] = near * even[k][p] + far * a[k][p];
            a[k][p] += even[k][p];
            b[k][p] = odd[k][p];
        }
    finish_row<K, P>(inner, call, 2);
    add_sums<K, P>(a, b, call, 2);
    finish_row<K, P>(a, call, 0);
    finish_row<K, P>(b, call, 3);
}

template <int K, int P>
void fill_bands(Kernels& table) {
    table.band_tile[K][P] = band_tile<K, P>;
    if constexpr (P > 1) fill_bands<K, P - 1>(table);
}

template <int K, int P>
void band_row(Kernels& table) {
    table.band_vectors[K] = P;
    fill_bands<K, P>(table);
}

// Two sums for each filter and vector fit the registers.
void make_bands(Kernels& table) {
    table.band_input = band_input;
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
