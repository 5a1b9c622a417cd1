// A convolution by Winograd's method: a band of rows is transformed for all filters, then summed tile by tile.
#include <algorithm>

#include "ops.h"
#include "tiling.h"
#include "winograd.h"

namespace dsp {

// The combinations of the rows that a band reads, of all channels, from vector `column` of the output on.
void BandConvOp::transform(float* to, int band, int column, int columns, const Context& context) const {
    const Geometry& g = x.geometry;
    const int64_t first = int64_t(column) * kernels->lanes - int64_t(step->padding[1]) * g.interleave;
    const int64_t floats = int64_t(columns) * kernels->lanes +
                           int64_t(step->kernel[1] - 1) * step->dilation[1] * g.interleave;
    BandInput call{};
    call.pitch = transformed_pitch;
    call.vectors = (floats + kernels->lanes - 1) / kernels->lanes;
    for (size_t n = 0; n < used.size(); ++n) {
        const float* plane = x.plane(context, used[n]) + first;
        for (int i = 0; i < band_sums; ++i) {
            const int row = band * band_rows + i - step->padding[0];
            call.row[i] = row < 0 || row >= g.h ? zeros.data() : plane + row * g.pitch * g.interleave;
        }
        call.out = to + int64_t(n) * band_sums * transformed_pitch;
        kernels->band_input(call);
    }
}

void BandConvOp::run(int chunk, const Context& context) const {
    const Chunk& part = parts[chunk];
    prepare(part, context, true);
    float* const transformed = context.arena + scratch + context.worker * scratch_size;
    const Geometry& g = y.geometry;
    const int64_t row = g.pitch * g.interleave;
    const int lanes = kernels->lanes;
    BandCall call{};
    call.pitch = transformed_pitch;
    call.y_pitch = row;
    call.act = step->act;
    for (int band = part.first_vector; band < part.last_vector; ++band)
        for (int block = 0; block < row_vectors; block += block_columns) {
            const int columns = std::min(block_columns, row_vectors - block);
            transform(transformed, band, block, columns, context);
            call.rows = std::min(band_rows, g.h - band * band_rows);
            for (int begin = 0; begin < columns; begin += sum_columns) {
                const int end = std::min(begin + sum_columns, columns);
                for (int t = part.first_tile; t < part.last_tile; ++t) {
                    const FilterTile& tile = packed->tiles[t];
                    const int K = tile.filters, most = kernels->vectors[K];
                    call.off = off[tile.group].data();
                    call.count = int64_t(off[tile.group].size());
                    call.w = packed->weights.data() + tile.weights;
                    call.bias = packed->bias.data() + tile.bias;
                    call.y_plane = tile_planes.data() + tile_begin[t];
                    call.add_plane = call.y_plane + K;
                    for (int v = begin; v < end;) {
                        const int P = pass_width(end - v, most);
                        const int64_t at = int64_t(band) * band_rows * row + int64_t(block + v) * lanes;
                        call.x = transformed + int64_t(v) * lanes;
                        call.y = y.in(context) + at;
                        call.add = has_add ? context.arena + at : nullptr;
                        call.tail = block + v + P == row_vectors ? tail : lanes;
                        kernels->band_tile[K][P](call);
                        v += P;
                    }
                }
            }
        }
}

} // namespace dsp
