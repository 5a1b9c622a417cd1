// The part of the builder that makes operations, when all places are known.
#include <algorithm>
#include <set>

#include "builder.h"

namespace dsp {

void Builder::emit(Plan& plan) {
    const auto by_channel = [&](std::unique_ptr<Op> op, int channels) {
        op->chunks = std::max(1, std::min(key_.parts(), channels));
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
