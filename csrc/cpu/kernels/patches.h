// Winograd's method over pairs of columns of a band, a part of bands.h; winograd.h has the formulas.
#pragma once

namespace dsp {
namespace {

void patch_input(const PatchInput& call) {
    constexpr int first[column_sums] = {1, 2, 0, 3}, second[column_sums] = {2, 1, 2, 1};
    const int64_t images = call.images;
    for (int64_t v = 0; v < call.vectors; ++v) {
        const int64_t at = call.at[v];
#pragma GCC unroll 4
        for (int u = 0; u < column_sums; ++u) {
            V d[band_sums];
#pragma GCC unroll 6
            for (int i = 0; i < band_sums; ++i) {
                const float* const row = call.row[i] + at;
                const V a = load(row + first[u] * images), b = load(row + second[u] * images);
                d[i] = u == 0 ? a + b : a - b;
            }
            combine_rows(d, call.out + u * call.pitch + v * L, column_sums * call.pitch);
        }
    }
}

template <int P, bool whole>
__attribute__((noinline)) void finish_patches(const V* sums, int filters, const BandCall& call) {
    const Finish<whole> finish(call);
    const int rows = call.rows, next = filters * P, second = call.second;
    const int64_t pitch = call.y_pitch;
    int at[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) at[p] = call.at[p];
    for (int k = 0; k < filters; ++k) {
        float* const plane = call.y + call.y_plane[k];
        const float* const add = call.add ? call.add + call.add_plane[k] : nullptr;
        const V bias = V{} + call.bias[k];
        for (int p = 0; p < P; ++p, ++sums) {
            V sum[band_sums], left[band_rows], right[band_rows];
#pragma GCC unroll 6
            for (int s = 0; s < band_sums; ++s) {
                const V* const of = sums + s * column_sums * next;
                sum[s] = of[0] + of[next] + of[2 * next];
            }
            separate_rows(sum, left, bias);
#pragma GCC unroll 6
            for (int s = 0; s < band_sums; ++s) {
                const V* const of = sums + s * column_sums * next;
                sum[s] = of[0] - of[next] + of[3 * next];
            }
            separate_rows(sum, right, bias);
#pragma GCC unroll 4
            for (int row = 0; row < band_rows; ++row) {
                if (row >= rows) break;
                float* const y = plane + row * pitch;
                const float* const residual = add ? add + row * pitch : nullptr;
                finish(y, residual, at[p], left[row]);
                finish(y, residual, at[p] + second, right[row]);
            }
        }
    }
}

} // namespace
} // namespace dsp
