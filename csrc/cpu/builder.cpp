#include "builder.h"

#include <algorithm>
#include <set>

namespace dsp {

namespace {

int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

std::string text(int h, int w) { return std::to_string(h) + "x" + std::to_string(w); }

} // namespace

Builder::Builder(const Network& network, const PlanKey& key) : network_(network), key_(key) {}

void Builder::build(Plan& plan) {
    shapes();
    geometry();
    lifetimes();
    scratch_begin_ = round_up(memory(), 16);
    emit(plan);
    plan.arena_floats = scratch_begin_ + scratch_floats_ + 64;
}

Builder::Summary Builder::summary() {
    shapes();
    geometry();
    lifetimes();
    Summary summary{std::vector<std::vector<int>>(network_.outputs), memory()};
    for (const Step& step : network_.steps)
        if (step.kind == Kind::output) {
            const Node& node = nodes_[step.inputs[0]];
            summary.outputs[step.number] = {node.channels, node.h, node.w};
        }
    return summary;
}

int Builder::root(int node) {
    while (nodes_[node].parent != node) node = nodes_[node].parent = nodes_[nodes_[node].parent].parent;
    return node;
}

void Builder::tie(int a, int b) {
    a = root(a), b = root(b);
    if (a == b) return;
    nodes_[b].parent = a;
    Pads &p = pads_[a], &q = pads_[b];
    p = {std::max(p.top, q.top), std::max(p.bottom, q.bottom), std::max(p.left, q.left), std::max(p.right, q.right)};
}

int Builder::add_node(int channels, int h, int w) {
    if (h < 1 || w < 1 || h > (1 << 20) || w > (1 << 20)) fail("a map of " + text(h, w) + " pixels is not possible");
    const int number = int(nodes_.size());
    nodes_.push_back({channels, h, w, number, number});
    pads_.push_back({});
    return number;
}

// A view reads the planes of nodes that have memory, also where it is made of views.
void Builder::add_view(const Step& step) {
    const Node first = nodes_[step.inputs[0]];
    for (int input : step.inputs)
        if (nodes_[input].h != first.h || nodes_[input].w != first.w)
            fail("maps of " + text(first.h, first.w) + " and " + text(nodes_[input].h, nodes_[input].w) +
                 " pixels cannot be put side by side");
    const int made = add_node(int(step.planes.size()), first.h, first.w);
    for (const Pair& plane : step.planes) {
        const int node = step.inputs[plane[0]];
        nodes_[made].view.push_back(nodes_[node].view.empty() ? Plane{node, plane[1]} : nodes_[node].view[plane[1]]);
    }
    for (int input : step.inputs) tie(input, made);
}

std::set<int> Builder::buffers(int node) const {
    std::set<int> found;
    for (const Plane& plane : nodes_[node].view) found.insert(nodes_[plane.node].buffer);
    if (found.empty()) found.insert(nodes_[node].buffer);
    return found;
}

// Sizes of all values, which values share a class, and what padding each class needs.
void Builder::shapes() {
    drafts_.resize(network_.steps.size());
    // Nodes of the network's values come first and keep their numbers.
    std::vector<Split> later;
    for (size_t s = 0; s < network_.steps.size(); ++s) {
        const Step& step = network_.steps[s];
        Draft& draft = drafts_[s];
        if (!step.inputs.empty()) draft.x = step.inputs[0];
        const Node x = draft.x >= 0 ? nodes_[draft.x] : Node{};
        switch (step.kind) {
        case Kind::input: {
            const Size size = key_.sizes[step.number];
            add_node(network_.values[step.output].channels, size.h, size.w);
            break;
        }
        case Kind::conv:
        case Kind::pool: {
            int size[2];
            for (int a = 0; a < 2; ++a)
                size[a] = output_size(a ? x.w : x.h, step.kernel[a], step.stride[a], step.padding[a],
                                      step.dilation[a], step.ceil_mode);
            if (size[0] < 1 || size[1] < 1)
                fail("an input of " + text(x.h, x.w) + " pixels is too small for a kernel of " +
                     text(step.kernel[0], step.kernel[1]));
            add_node(network_.values[step.output].channels, size[0], size[1]);
            break;
        }
        case Kind::map: add_node(x.channels, x.h, x.w); break;
        case Kind::mean: add_node(x.channels, 1, 1); break;
        case Kind::product: {
            const Node other = nodes_[step.inputs[1]];
            draft.large = x.h * x.w == 1 && other.h * other.w > 1;
            const Node &large = draft.large ? other : x, &small = draft.large ? x : other;
            if (small.h * small.w > 1 && (small.h != large.h || small.w != large.w))
                fail("maps of " + text(x.h, x.w) + " and " + text(other.h, other.w) + " pixels cannot be multiplied");
            add_node(x.channels, large.h, large.w);
            tie(step.inputs[draft.large], step.output);
            if (small.h == large.h && small.w == large.w) tie(step.inputs[!draft.large], step.output);
            break;
        }
        case Kind::adaptive: add_node(x.channels, step.kernel[0], step.kernel[1]); break;
        case Kind::view: add_view(step); break;
        case Kind::linear: {
            if (int64_t(x.channels) * x.h * x.w != step.number)
                fail("a linear layer of " + std::to_string(step.number) + " features got " +
                     std::to_string(x.channels) + "x" + text(x.h, x.w));
            add_node(network_.values[step.output].channels, 1, 1);
            break;
        }
        case Kind::output: break;
        }
        const size_t others = step.kind == Kind::map || step.kind == Kind::conv ? step.inputs.size() : 0;
        for (size_t i = step.kind == Kind::map ? 0 : 1; i < others; ++i) {
            const Node &other = nodes_[step.inputs[i]], &y = nodes_[step.output];
            if (other.h != y.h || other.w != y.w)
                fail("a residual of " + text(other.h, other.w) + " pixels cannot be added to " + text(y.h, y.w));
            tie(step.inputs[i], step.output);
        }
    }
    for (size_t s = 0; s < network_.steps.size(); ++s) {
        const Step& step = network_.steps[s];
        if (step.kind == Kind::conv) {
            std::vector<Source> sources;
            for (const auto& group : step.groups)
                for (const Source& source : Network::sources(step, group.in)) sources.push_back(source);
            window(int(s), sources, nodes_[step.output].h, nodes_[step.output].w);
        } else if (step.kind == Kind::pool) {
            // A pad counts as 0: right for a maximum of numbers that are not negative, and for an average that
            // divides every window by the same number.
            const bool zeros = step.average ? !step.ceil_mode && (step.include_pad || step.divisor ||
                                                                  (step.padding[0] == 0 && step.padding[1] == 0))
                                            : network_.values[step.inputs[0]].nonnegative;
            drafts_[s].fast_pool = zeros;
            std::vector<Source> sources;
            for (int c = 0; c < nodes_[step.inputs[0]].channels; ++c) sources.push_back({c, -1});
            if (zeros) window(int(s), sources, nodes_[step.output].h, nodes_[step.output].w);
        }
    }
}

// Turns a strided window into one of stride 1 over an input that is sorted by phase, and by pairs of channels where
// the step computes with those.
void Builder::window(int number, const std::vector<Source>& sources, int h, int w) {
    const Step& step = network_.steps[number];
    Draft& draft = drafts_[number];
    const Pair stride = step.stride;
    for (int ky = 0; ky < step.kernel[0]; ++ky)
        for (int kx = 0; kx < step.kernel[1]; ++kx) {
            const int y = ky * step.dilation[0] - step.padding[0], x = kx * step.dilation[1] - step.padding[1];
            const int dy = floor_div(y, stride[0]), dx = floor_div(x, stride[1]);
            draft.taps.push_back({y - dy * stride[0], x - dx * stride[1], dy, dx});
        }
    const bool strided = stride[0] > 1 || stride[1] > 1;
    if (strided || step.pairs) {
        const int source = step.inputs[0];
        for (size_t i = 0; i < splits_.size(); ++i)
            if (splits_[i].source == source && splits_[i].stride == stride && splits_[i].pairs == step.pairs)
                draft.split = int(i);
        if (draft.split < 0) {
            const Node x = nodes_[source];
            const int node = add_node(0, (x.h + stride[0] - 1) / stride[0], (x.w + stride[1] - 1) / stride[1]);
            splits_.push_back({node, source, stride, step.pairs, {}, false});
            if (!strided) tie(source, node); // so that whole planes are paired at once
            draft.split = int(splits_.size()) - 1;
        }
        Split& split = splits_[draft.split];
        for (const Tap& tap : draft.taps)
            for (const Source& one : sources)
                split.plane.emplace(std::make_tuple(tap.row_phase, tap.column_phase, one.channel, one.other), 0);
        draft.x = split.node;
    }
    tie(draft.x, step.output);
    Pads& pads = pads_[root(draft.x)];
    const Node& x = nodes_[draft.x];
    for (const Tap& tap : draft.taps) {
        pads.top = std::max(pads.top, -tap.dy);
        pads.left = std::max(pads.left, -tap.dx);
        pads.bottom = std::max(pads.bottom, h + tap.dy - x.h);
        pads.right = std::max(pads.right, w + tap.dx - x.w);
    }
}

} // namespace dsp
