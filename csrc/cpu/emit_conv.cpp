// The part of the builder that makes convolutions: how they are computed, cut into tiles and into chunks.
#include <algorithm>
#include <numeric>
#include <set>

#include "builder.h"

namespace dsp {

std::vector<int32_t> Builder::displacements(const Draft& draft, const std::vector<Source>& sources) {
    const Place x = place(draft.x);
    std::vector<int32_t> off;
    for (const Source& one : sources)
        for (const Tap& tap : draft.taps) {
            const int plane = draft.split < 0 ? one.channel
                                              : splits_[draft.split].plane.at(std::make_tuple(
                                                    tap.row_phase, tap.column_phase, one.channel, one.other));
            off.push_back(int32_t(x.planes[plane] + x.geometry.at(0, tap.dy, tap.dx)));
        }
    return off;
}

std::unique_ptr<Op> Builder::conv(int number, const Draft& draft) {
    const Step& step = network_.steps[number];
    auto op = std::make_unique<ConvOp>();
    op->kernels = &network_.kernels, op->step = &step;
    op->x = place(draft.x), op->y = place(step.output);
    op->has_add = step.inputs.size() == 2;
    op->add = op->has_add ? place(step.inputs[1]) : Place{};
    op->in_place = op->has_add && nodes_[step.output].buffer == nodes_[step.inputs[1]].buffer;
    op->skip_absent = op->in_place && (step.act == Act::none || (step.act == Act::relu &&
                                                                network_.values[step.inputs[1]].nonnegative));
    op->vectors = cover(op->y.geometry, network_.kernels.lanes);
    for (const auto& group : step.groups) op->off.push_back(displacements(draft, Network::sources(step, group.in)));
    block_conv(*op, draft);
    // How many threads share the operation must not decide how it is computed: their answers are equal to the bit.
    double least = 0.0;
    for (size_t g = 0; g < op->off.size(); ++g) {
        const Extent whole = extent(*op, int64_t(op->off[g].size()), 1);
        for (int filters : split_filters(network_.kernels, int(step.groups[g].out.size()), whole))
            least += tile_cost(network_.kernels, filters, whole);
    }
    if (auto in_bands = band_conv(*op, draft, least)) return in_bands;
    const int pieces = vector_pieces(*op);
    Splits splits;
    for (size_t g = 0; g < op->off.size(); ++g) {
        const Extent piece = extent(*op, int64_t(op->off[g].size()), pieces);
        splits.push_back(split_filters(network_.kernels, int(step.groups[g].out.size()), piece));
    }
    op->packed = network_.packed(step, splits);
    place_tiles(*op);
    std::vector<double> costs;
    for (const auto& tile : op->packed->tiles)
        costs.push_back(tile_cost(network_.kernels, tile.filters, extent(*op, int64_t(op->off[tile.group].size()), pieces)));
    chunk_conv(*op, int(op->vectors.at.size()), pieces, costs);
    return op;
}

void Builder::place_tiles(ConvOp& op) const {
    for (const auto& tile : op.packed->tiles) {
        op.tile_begin.push_back(int(op.tile_planes.size()));
        for (int c : tile.channels) op.tile_planes.push_back(c * op.y.geometry.plane);
        for (int c : tile.channels) op.tile_planes.push_back(op.has_add ? op.add.planes[c] : 0);
    }
}

// Vectors and reduction terms of one pass. Between passes the sums go through memory, which costs about a tenth
// of a pass of 40 terms. A window of several taps reads each line of the input often, so its passes keep to the
// first-level cache: ResNet-20's 8x8 layers 87 % of peak, 73 % without passes. A 1x1 convolution reads a line
// once per filter tile and has short passes there, so it keeps to the second level: ResNet-50 at batch 1
// 15.5 ms, 16.6 ms with passes of 32 KB.
void Builder::block_conv(ConvOp& op, const Draft& draft) {
    const int64_t taps = int64_t(draft.taps.size());
    const int64_t cache = taps > 1 ? 32 << 10 : 256 << 10;
    const int64_t vector = network_.kernels.lanes * int64_t(sizeof(float));
    std::set<int> rows;
    for (const Tap& tap : draft.taps) rows.insert(tap.dy);
    const int64_t lines = int64_t(rows.size());
    int64_t widest = 0;
    for (const auto& off : op.off) widest = std::max(widest, int64_t(off.size()) / taps);
    // Multiples of most widths of a microtile. On a Zen 1 CPU with vectors of 8, the 1x1 convolutions of ResNet-50 80 %
    // on 56x56 reach 56 % of peak with blocks of 12 and 44 % with 24, on 14x14 66 % and 63 %.
    const bool narrow = taps == 1 && network_.kernels.lanes <= 8;
    const int block = narrow || (taps > 1 && widest * 24 * vector * lines > cache) ? 12 : 24;
    // No short block at the end: it would fill no microtile.
    const int vectors = int(op.vectors.at.size()), rest = vectors % block;
    const int blocks = (vectors + block - 1) / block;
    op.block_vectors = rest && rest * 4 <= block ? (vectors + blocks - 1) / blocks : block;
    const int64_t channels = std::max<int64_t>(cache / (op.block_vectors * vector * lines), 1);
    for (const auto& off : op.off) {
        // Equal passes, not one short one at the end.
        const int64_t total = int64_t(off.size()) / taps;
        const int64_t passes = std::max<int64_t>((total + channels - 1) / channels, 1);
        op.block_terms.push_back(int(std::max<int64_t>((total + passes - 1) / passes * taps, 1)));
    }
}

int Builder::vector_pieces(const ConvOp& op) const {
    return std::max(1, std::min(key_.parts(), int(op.vectors.at.size()) / 12));
}

Extent Builder::extent(const ConvOp& op, int64_t count, int pieces) const {
    const int vectors = int(op.vectors.at.size());
    return {count, (vectors + pieces - 1) / pieces, op.block_vectors, key_.interleave >= network_.kernels.lanes,
            op.step->pairs ? op.step->pairs->ready : 4.0};
}

// Pieces of about equal work: ranges of units (vectors or bands) where there are many, else ranges of filter tiles.
void Builder::chunk_conv(ConvOp& op, int units, int by_units, const std::vector<double>& costs) {
    const int tiles = int(costs.size());
    const int absent = op.skip_absent ? 0 : int(op.step->absent.size());
    const int by_tiles = std::max(1, std::min(tiles, (key_.parts() + by_units - 1) / by_units));
    std::vector<double> cost(tiles + 1, 0.0);
    std::partial_sum(costs.begin(), costs.end(), cost.begin() + 1);
    std::vector<int> border{0};
    for (int part = 1; part < by_tiles; ++part) {
        const double target = cost[tiles] * part / by_tiles;
        int t = border.back();
        while (t < tiles && (cost[t] + cost[t + 1]) / 2 < target) ++t;
        border.push_back(t);
    }
    border.push_back(tiles);
    const int pieces = by_units * by_tiles;
    for (int u = 0; u < by_units; ++u)
        for (int t = 0; t < by_tiles; ++t) {
            const Range range = cut(units, by_units, u), rest = cut(absent, pieces, u * by_tiles + t);
            op.parts.push_back({range.first, range.last, border[t], border[t + 1], rest.first, rest.last});
        }
    op.chunks = int(op.parts.size());
}

} // namespace dsp
