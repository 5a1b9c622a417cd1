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

// One of the six sums of a tile.
template <int K, int P>
inline __attribute__((always_inline)) void sum_band(V (&sum)[K][P], const float* x, const BandCall& call, const float* w) {
    const int32_t* off = call.off;
    const int32_t* const end = off + call.count;
    V acc[K][P];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[k][p] = V{};
    const auto add = [&](int64_t o, const float* weights) __attribute__((always_inline)) {
        V in[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) in[p] = load(x + o + p * L);
        multiply_add<K, P>(acc, in, weights);
    };
    for (; end - off >= 3; off += 3, w += 3 * K) { // as in sum_tile
        add(off[0], w);
        add(off[1], w + K);
        add(off[2], w + 2 * K);
    }
    for (; off != end; ++off, w += K) add(off[0], w);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum[k][p] = acc[k][p];
}

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

// The rows of a band from its sums, [band_sums][filters][vectors].
template <int P>
__attribute__((noinline)) void finish_band(const V* sums, int filters, const BandCall& call) {
    constexpr float near = float(square_near), far = float(square_far);
    constexpr float near_cube = near * near_float, far_cube = far * far_float;
    const bool late = is_late(call.act);
    const Bounds bounds(call.act);
    const int rows = call.rows, tail = call.tail, next = filters * P;
    const int64_t pitch = call.y_pitch;
    for (int k = 0; k < filters; ++k, sums += P) {
        const V bias = V{} + call.bias[k];
        float* const plane = call.y + call.y_plane[k];
        const float* const add = call.add ? call.add + call.add_plane[k] : nullptr;
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            const V* const sum = sums + p;
            const V even = sum[0] + sum[next], odd = sum[0] - sum[next];
            const V far_even = sum[2 * next] + sum[3 * next], far_odd = sum[2 * next] - sum[3 * next];
            V y[band_rows];
            y[0] = even + far_even + sum[4 * next];
            y[1] = near_float * odd + far_float * far_odd;
            y[2] = near * even + far * far_even;
            y[3] = near_cube * odd + far_cube * far_odd + sum[5 * next];
#pragma GCC unroll 4
            for (int row = 0; row < band_rows; ++row) {
                if (row >= rows) break;
                const int64_t at = row * pitch + p * L;
                V v = y[row] + bias;
                if (add) v += load(add + at);
                v = bounds(v);
                if (late) v = activate(v, call.act);
                if (p + 1 < P || tail == L)
                    store(plane + at, v);
                else // what follows are pad columns, or the next row, which another thread may be writing
                    store_some(plane + at, v, tail);
            }
        }
    }
}

template <int K, int P>
void band_tile(const BandCall& call) {
    V sums[band_sums][K][P]; // in the first-level cache: one sum at a time fills the registers as a plain tile does
    for (int s = 0; s < band_sums; ++s) sum_band<K, P>(sums[s], call.x + s * call.pitch, call, call.w + s * call.count * K);
    finish_band<P>(&sums[0][0][0], K, call);
}

} // namespace
} // namespace dsp
