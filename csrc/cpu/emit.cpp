// The part of the builder that makes operations, when all places are known.
#include <algorithm>
#include <set>

#include "builder.h"

namespace dsp {

void Builder::emit(Plan& plan) {
    const auto by_channel = [&](std::unique_ptr<Op> op, int channels) {
        op->chunks = std::max(1, std::min(key_.parts, channels));
        plan.ops.push_back(std::move(op));
    };
    for (size_t s = 0; s < network_.steps.size(); ++s) {
        const Step& step = network_.steps[s];
        const Draft& draft = drafts_[s];
        if (draft.split >= 0 && !splits_[draft.split].emitted) {
            Split& split = splits_[draft.split];
            split.emitted = true;
            auto op = std::make_unique<SplitOp>();
            op->from = place(split.source), op->to = place(split.node), op->stride = split.stride, op->kernels = &network_.kernels;
            op->pairs = split.pairs;
            for (const auto& entry : split.plane)
                op->planes.push_back({std::get<2>(entry.first), std::get<3>(entry.first), std::get<0>(entry.first),
                                      std::get<1>(entry.first), entry.second});
            const int planes = int(op->planes.size());
            by_channel(std::move(op), planes);
        }
        const int channels = step.output >= 0 ? nodes_[step.output].channels : 1;
        switch (step.kind) {
        case Kind::input: {
            auto op = std::make_unique<LoadOp>();
            op->to = place(step.output), op->number = step.number;
            op->used = used_channels(step.output);
            by_channel(std::move(op), channels);
            break;
        }
        case Kind::conv:
            plan.ops.push_back(conv(int(s), draft));
            break;
        case Kind::map: {
            auto op = std::make_unique<MapOp>();
            op->kernels = &network_.kernels, op->step = &step;
            op->a = place(step.inputs[0]), op->y = place(step.output);
            op->has_b = step.inputs.size() == 2;
            if (op->has_b) op->b = place(step.inputs[1]);
            op->vectors = cover(op->y.geometry, network_.kernels.lanes);
            by_channel(std::move(op), channels);
            break;
        }
        case Kind::pool: by_channel(pool(int(s), draft), channels); break;
        case Kind::mean: {
            auto op = std::make_unique<MeanOp>();
            op->x = place(step.inputs[0]), op->y = place(step.output);
            by_channel(std::move(op), channels);
            break;
        }
        case Kind::product: {
            auto op = std::make_unique<ProductOp>();
            op->kernels = &network_.kernels, op->act = step.act;
            op->a = place(step.inputs[draft.large]), op->b = place(step.inputs[!draft.large]);
            op->y = place(step.output);
            op->one_pixel = op->b.geometry.h * op->b.geometry.w == 1;
            op->vectors = cover(op->y.geometry, network_.kernels.lanes);
            by_channel(std::move(op), channels);
            break;
        }
        case Kind::adaptive: {
            auto op = std::make_unique<AdaptiveOp>();
            op->x = place(step.inputs[0]), op->y = place(step.output);
            by_channel(std::move(op), channels);
            break;
        }
        case Kind::view: break;
        case Kind::linear: by_channel(linear(int(s)), (channels + 63) / 64); break;
        case Kind::output: {
            auto op = std::make_unique<StoreOp>();
            op->from = place(step.inputs[0]), op->number = step.number;
            const int planes = op->from.geometry.channels;
            by_channel(std::move(op), planes);
            break;
        }
        }
        if (step.kind != Kind::view) plan.ops.back()->made = step.output;
    }
}

// Which channels of a value are read at all: only a convolution or a view can leave some out.
std::vector<char> Builder::used_channels(int value) const {
    std::vector<char> used(nodes_[value].channels, 0);
    for (const Step& step : network_.steps)
        for (size_t i = 0; i < step.inputs.size(); ++i) {
            if (step.inputs[i] != value) continue;
            if (step.kind == Kind::view) {
                const auto seen = used_channels(step.output);
                for (size_t k = 0; k < seen.size(); ++k)
                    if (seen[k] && step.planes[k][0] == int(i)) used[step.planes[k][1]] = 1;
                continue;
            }
            if (step.kind != Kind::conv || i > 0) return std::vector<char>(used.size(), 1);
            for (const auto& group : step.groups)
                for (int c : group.in) used[c] = 1;
        }
    return used;
}

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
    tile_conv(*op);
    for (const auto& tile : op->packed->tiles) {
        op->tile_begin.push_back(int(op->tile_planes.size()));
        for (int c : tile.channels) op->tile_planes.push_back(c * op->y.geometry.plane);
        for (int c : tile.channels) op->tile_planes.push_back(op->has_add ? op->add.planes[c] : 0);
    }
    chunk_conv(*op);
    return op;
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
    // Multiples of most widths of a microtile.
    const int block = taps > 1 && widest * 24 * vector * lines > cache ? 12 : 24;
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
    return std::max(1, std::min(key_.parts, int(op.vectors.at.size()) / 12));
}

Extent Builder::extent(const ConvOp& op, int64_t count) const {
    const int pieces = vector_pieces(op);
    const int vectors = int(op.vectors.at.size());
    return {count, (vectors + pieces - 1) / pieces, op.block_vectors, key_.interleave >= network_.kernels.lanes,
            op.step->pairs ? 6.0 : 4.0};
}

void Builder::tile_conv(ConvOp& op) {
    Splits splits;
    for (size_t g = 0; g < op.off.size(); ++g)
        splits.push_back(split_filters(network_.kernels, int(op.step->groups[g].out.size()),
                                       extent(op, int64_t(op.off[g].size()))));
    op.packed = network_.packed(*op.step, splits);
}

// Pieces of about equal work: ranges of vectors where there are many, else ranges of filter tiles.
void Builder::chunk_conv(ConvOp& op) {
    const auto& all = op.packed->tiles;
    const int vectors = int(op.vectors.at.size()), tiles = int(all.size());
    const int absent = op.skip_absent ? 0 : int(op.step->absent.size());
    const int by_vectors = vector_pieces(op);
    const int by_tiles = std::max(1, std::min(tiles, (key_.parts + by_vectors - 1) / by_vectors));
    std::vector<double> cost(tiles + 1, 0.0);
    for (int t = 0; t < tiles; ++t)
        cost[t + 1] = cost[t] + tile_cost(network_.kernels, all[t].filters,
                                          extent(op, int64_t(op.off[all[t].group].size())));
    std::vector<int> border{0};
    for (int part = 1; part < by_tiles; ++part) {
        const double target = cost[tiles] * part / by_tiles;
        int t = border.back();
        while (t < tiles && (cost[t] + cost[t + 1]) / 2 < target) ++t;
        border.push_back(t);
    }
    border.push_back(tiles);
    const int pieces = by_vectors * by_tiles;
    for (int v = 0; v < by_vectors; ++v)
        for (int t = 0; t < by_tiles; ++t) {
            const Range range = cut(vectors, by_vectors, v), rest = cut(absent, pieces, v * by_tiles + t);
            op.parts.push_back({range.first, range.last, border[t], border[t + 1], rest.first, rest.last});
        }
    op.chunks = int(op.parts.size());
}

std::unique_ptr<Op> Builder::pool(int number, const Draft& draft) {
    const Step& step = network_.steps[number];
    if (!draft.fast_pool) {
        auto op = std::make_unique<PoolOp>();
        op->step = &step, op->x = place(step.inputs[0]), op->y = place(step.output);
        return op;
    }
    // Displacements from plane c to plane c + 1 are the same for all taps only if every phase has its own run
    // of planes; they are sorted by phase, then channel, and all channels are there.
    auto op = std::make_unique<FastPoolOp>();
    op->kernels = &network_.kernels;
    op->x = place(draft.x), op->y = place(step.output);
    op->vectors = cover(op->y.geometry, network_.kernels.lanes);
    op->off = displacements(draft, {{0, -1}});
    for (int32_t& off : op->off) off -= int32_t(op->x.planes[0]);
    op->average = step.average;
    op->scale = 1.0f / float(step.divisor ? step.divisor : step.kernel[0] * step.kernel[1]);
    return op;
}

std::unique_ptr<Op> Builder::linear(int number) {
    const Step& step = network_.steps[number];
    auto op = std::make_unique<LinearOp>();
    op->kernels = &network_.kernels, op->step = &step;
    op->x = place(step.inputs[0]), op->y = place(step.output);
    const Geometry& g = op->x.geometry;
    for (int c = 0; c < g.channels; ++c)
        for (int y = 0; y < g.h; ++y)
            for (int x = 0; x < g.w; ++x) op->off.push_back(int32_t(op->x.planes[c] + g.at(0, y, x)));
    return op;
}

Plan::Plan(const Network& network, const PlanKey& key) : key(key) { Builder(network, this->key).build(*this); }

} // namespace dsp
