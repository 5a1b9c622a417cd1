// The part of the builder that gives every value its place: padding and pitch, how long it lives, where its memory lies.
#include <algorithm>
#include <limits>
#include <set>

#include "builder.h"

namespace dsp {

void Builder::geometry() {
    for (Split& split : splits_) {
        int number = 0;
        for (auto& entry : split.plane) entry.second = number++;
        nodes_[split.node].channels = std::max(number, 1);
    }
    std::vector<int64_t> pitch(nodes_.size(), 0);
    for (size_t n = 0; n < nodes_.size(); ++n) {
        const int r = root(int(n));
        pitch[r] = std::max<int64_t>(pitch[r], nodes_[n].w + std::max(pads_[r].left, pads_[r].right));
    }
    const int64_t I = key_.interleave;
    for (size_t n = 0; n < nodes_.size(); ++n) {
        Node& node = nodes_[n];
        const Pads& pads = pads_[root(int(n))];
        Geometry& g = node.geometry;
        g.channels = node.channels, g.h = node.h, g.w = node.w, g.interleave = int(I);
        g.pitch = pitch[root(int(n))];
        // The rows under a plane are the rows over the next.
        const int64_t gap = std::max(pads.top, pads.bottom) * g.pitch * I;
        // A last vector that runs over the plane's end must not reach the next plane.
        g.plane = round_up(g.h * g.pitch * I + std::max<int64_t>(gap, 16), 16);
        // Planes at a distance of a power of two would all fall into the same few sets of the cache.
        if (g.plane / 16 % 2 == 0) g.plane += 16;
        g.lead = round_up((pads.top * g.pitch + pads.left) * I, 16);
        const int64_t reach = ((g.h - 1 + pads.bottom) * g.pitch + g.w + pads.right) * I + 16;
        g.size = round_up(g.lead + (g.channels - 1) * g.plane + std::max(g.plane, reach), 16);
        if (g.size > std::numeric_limits<int32_t>::max()) fail("a map is larger than 8 GB; use a smaller batch or image");
    }
}

// First and last operation of every buffer. Operations are numbered as emit() makes them.
void Builder::lifetimes() {
    int number = 0;
    std::vector<int> last_step(nodes_.size(), -1);
    for (size_t s = 0; s < network_.steps.size(); ++s)
        if (network_.steps[s].kind != Kind::view)
            for (int input : network_.steps[s].inputs)
                for (int buffer : buffers(input)) last_step[buffer] = int(s);
    const auto read = [&](int node, int operation) {
        for (int buffer : buffers(node)) nodes_[buffer].last = operation;
    };
    std::set<int> split_done;
    for (size_t s = 0; s < network_.steps.size(); ++s) {
        const Step& step = network_.steps[s];
        const Draft& draft = drafts_[s];
        if (step.kind == Kind::view) continue;
        if (draft.split >= 0 && split_done.insert(draft.split).second) {
            nodes_[draft.x].first = number;
            read(splits_[draft.split].source, number);
            ++number;
        }
        if (draft.x >= 0) read(draft.x, number);
        for (size_t i = 1; i < step.inputs.size(); ++i) read(step.inputs[i], number);
        if (step.output >= 0) {
            Node& y = nodes_[step.output];
            y.first = number;
            // The sum may replace the residual if nothing reads that again and the window does not read it now.
            const int candidate = step.kind == Kind::conv && step.inputs.size() == 2 ? step.inputs[1]
                                  : step.kind == Kind::map                           ? step.inputs[0]
                                  : step.kind == Kind::product ? step.inputs[draft.large]
                                                               : -1;
            if (candidate >= 0 && nodes_[candidate].view.empty()) {
                const int buffer = nodes_[candidate].buffer;
                // A window reads other pixels of it, a view other planes, after they were overwritten.
                bool read_again = step.kind == Kind::conv && buffers(draft.x).count(buffer);
                for (int input : step.inputs)
                    if (!nodes_[input].view.empty()) read_again = read_again || buffers(input).count(buffer);
                if (last_step[buffer] == int(s) && !read_again) {
                    y.buffer = buffer;
                    last_step[buffer] = last_step[step.output];
                }
            }
            nodes_[y.buffer].last = std::max(nodes_[y.buffer].last, number);
        }
        ++number;
    }
}

// Where every buffer begins; returns the floats of scratch in all.
int64_t Builder::memory() {
    int64_t total = 0;
    std::vector<int> order;
    for (size_t n = 0; n < nodes_.size(); ++n)
        if (nodes_[n].buffer == int(n) && nodes_[n].first >= 0) order.push_back(int(n));
    std::sort(order.begin(), order.end(), [&](int a, int b) { return nodes_[a].first < nodes_[b].first; });
    std::vector<int> placed;
    for (int n : order) {
        Node& node = nodes_[n];
        node.last = std::max(node.last, node.first);
        std::vector<std::pair<int64_t, int64_t>> taken;
        for (int other : placed)
            if (nodes_[other].last >= node.first)
                taken.push_back({nodes_[other].offset, nodes_[other].offset + nodes_[other].geometry.size});
        std::sort(taken.begin(), taken.end());
        int64_t offset = 0;
        for (const auto& range : taken) {
            if (range.first - offset >= node.geometry.size) break;
            offset = std::max(offset, range.second);
        }
        node.offset = offset;
        placed.push_back(n);
        total = std::max(total, offset + node.geometry.size);
    }
    // Displacements count from the beginning of the scratch.
    if (total > std::numeric_limits<int32_t>::max() - 64) fail("the maps need more than 8 GB; use a smaller image");
    return total + 64;
}

Place Builder::place(int node) const {
    const auto first_pixel = [&](int n) { return nodes_[nodes_[n].buffer].offset + nodes_[n].geometry.lead; };
    const Node& own = nodes_[node];
    Place place{own.geometry, first_pixel(node), {}};
    for (int c = 0; c < own.channels; ++c) {
        const Plane plane = own.view.empty() ? Plane{node, c} : own.view[c];
        place.planes.push_back(first_pixel(plane.node) + plane.channel * nodes_[plane.node].geometry.plane);
    }
    return place;
}

} // namespace dsp
