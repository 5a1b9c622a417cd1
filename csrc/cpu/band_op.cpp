// A convolution by Winograd's method: a band of rows is transformed for all filters, then summed tile by tile.
#include <algorithm>

#include "ops.h"
#include "tiling.h"
#include "kernels/winograd.h"

namespace dsp {

// What the sums take from a band, of all channels, from vector `column` of the output on.
void BandConvOp::transform(float* to, int band, int column, int columns, const Context& context) const {
    const Geometry& g = x.geometry;
    const int I = g.interleave, lanes = kernels->lanes;
    const int64_t first = (patches ? 0 : int64_t(column) * lanes) - int64_t(step->padding[1]) * I;
    const int64_t floats = int64_t(columns) * lanes + int64_t(step->kernel[1] - 1) * step->dilation[1] * I;
    for (size_t n = 0; n < used.size(); ++n) {
        const float* row[band_sums];
        for (int i = 0; i < band_sums; ++i) {
            const int r = band * band_rows + i - step->padding[0];
            row[i] = r < 0 || r >= g.h ? zeros.data() : x.plane(context, used[n]) + first + r * g.pitch * I;
        }
        float* const out = to + int64_t(n) * channel;
        if (patches)
            kernels->patch_input({{row[0], row[1], row[2], row[3], row[4], row[5]}, I, at.data() + column, out, pitch, columns});
        else
            kernels->band_input({{row[0], row[1], row[2], row[3], row[4], row[5]}, out, pitch, (floats + lanes - 1) / lanes});
    }
}

void BandConvOp::run(int chunk, const Context& context) const {
    const Chunk& part = parts[chunk];
    prepare(part, context, true);
    float* const transformed = context.arena + scratch + context.worker * scratch_size;
    const Geometry& g = y.geometry;
    const int64_t row = g.pitch * g.interleave;
    const int lanes = kernels->lanes, row_vectors = int(at.size());
    BandCall call{};
    call.pitch = pitch;
    call.y_pitch = row;
    call.second = patches ? g.interleave : 0;
    call.row = g.w * g.interleave;
    call.act = step->act;
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
                    const int K = tile.filters, most = kernels->vectors[K];
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
                        kernels->band_tile[K][P](call);
                        v += P;
                    }
                }
            }
        }
}

} // namespace dsp
