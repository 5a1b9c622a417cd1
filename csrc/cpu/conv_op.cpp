#include <algorithm>
#include <cstring>

#include "ops.h"
#include "tiling.h"

namespace dsp {

void ConvOp::prepare(const Chunk& part, const Context& context, bool clear_columns) const {
    float* out = y.in(context);
    const int32_t* mask = vectors.mask.empty() ? nullptr : vectors.mask.data();
    for (int n = part.first_absent; n < part.last_absent; ++n) {
        const int c = step->absent[n];
        if (!in_place) clear_pads(y, out, c, c + 1, !vectors.covers_pads);
        if (has_add) {
            kernels->map({context.arena + add.planes[c], nullptr, out + c * y.geometry.plane, 1.0f, 0.0f,
                          vectors.at.data(), mask, int64_t(vectors.at.size()), step->act});
        } else {
            for (size_t v = 0; v < vectors.at.size(); ++v)
                std::memset(out + c * y.geometry.plane + vectors.at[v], 0, sizeof(float) * kernels->lanes);
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
    const int32_t* mask = vectors.mask.empty() ? nullptr : vectors.mask.data();
    const int lanes = kernels->lanes;
    prepare(part, context, !vectors.covers_pads);

    const auto& run_tile = step->pairs ? step->pairs->tile : kernels->tile;
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
            // A wide group is summed in passes, so that the planes of one pass stay in the first-level cache
            // while all filters read them.
            int64_t j = 0;
            do {
                const int64_t end = std::min<int64_t>(j + block_terms[group], count);
                for (int t = group_first; t < group_last; ++t) {
                    const FilterTile& tile = packed->tiles[t];
                    const int K = tile.filters, most = kernels->vectors[K];
                    call.off = off[group].data() + j;
                    call.count = end - j;
                    call.w = packed->weights.data() + tile.weights + j * K;
                    call.bias = j == 0 ? packed->bias.data() + tile.bias : nullptr;
                    call.y_plane = tile_planes.data() + tile_begin[t];
                    call.add = j > 0 ? out : residual;
                    call.add_plane = j > 0 ? call.y_plane : call.y_plane + K;
                    call.act = end == count ? step->act : Act::none;
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

} // namespace dsp
