#include "plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <set>

#include "ops.h"
#include "tiling.h"

namespace dsp {

int output_size(int size, int kernel, int stride, int padding, int dilation, bool ceil_mode) {
    const int64_t free = int64_t(size) + 2 * padding - int64_t(dilation) * (kernel - 1) - 1;
    const int64_t partial = ceil_mode ? stride - 1 : 0; // pixels that the last window may miss
    if (free + partial < 0) return -1;
    int64_t count = (free + partial) / stride + 1;
    // The last window has to begin inside the input or its left padding.
    if (ceil_mode && (count - 1) * stride >= int64_t(size) + padding) --count;
    return int(count);
}

double Work::cycles() const {
    const auto of = [&](Count count) { return counts[size_t(count)]; };
    return of(Count::bound) + of(Count::band_bound) + 2.0 * (of(Count::transforms) + of(Count::patch_transforms));
}

Work Op::busiest(int threads) const {
    Work most;
    if (!work) return most;
    threads = chunks > 1 ? threads : 1;
    for (int rank = 0; rank < threads; ++rank) {
        const Range own = cut(chunks, threads, rank);
        if (own.first == own.last) continue;
        Work one = work(cut(units, chunks, own.first).first, cut(units, chunks, own.last - 1).last);
        const auto size = [](Work& w) { return std::pair(w.cycles(), w[Count::traffic]); };
        if (size(one) > size(most)) most = one;
    }
    return most;
}

Vectors cover(const Geometry& g, int lanes) {
    const int64_t row = int64_t(g.w) * g.interleave, pitch = g.pitch * g.interleave;
    const int64_t per_row = (row + lanes - 1) / lanes;
    const int64_t flat = ((g.h - 1) * pitch + row + lanes - 1) / lanes;
    // A row's last vector may only extend into pad columns, never into the next row.
    const bool rows_fit = per_row * lanes <= pitch || g.h == 1;
    const bool by_row = rows_fit && per_row * g.h <= flat;
    Vectors vectors;
    vectors.covers_pads = !by_row;
    if (by_row) {
        for (int64_t y = 0; y < g.h; ++y)
            for (int64_t v = 0; v < per_row; ++v) vectors.at.push_back(int32_t(y * pitch + v * lanes));
        if (row % lanes == 0) return vectors;
    } else {
        for (int64_t v = 0; v < flat; ++v) vectors.at.push_back(int32_t(v * lanes));
    }
    // By far the largest part of a plan of large maps; most neighbouring operations share one.
    thread_local std::array<int64_t, 4> last_key;
    thread_local std::weak_ptr<const std::vector<int32_t>> last;
    const std::array<int64_t, 4> key{g.h, row, pitch, lanes};
    if (key == last_key && (vectors.mask = last.lock())) return vectors;
    std::vector<int32_t> mask(vectors.at.size() * lanes);
    for (size_t v = 0; v < vectors.at.size(); ++v)
        for (int l = 0; l < lanes; ++l) {
            const int64_t d = vectors.at[v] + l;
            const bool live = d / pitch < g.h && d % pitch < row;
            mask[v * lanes + l] = live ? -1 : 0;
        }
    last = vectors.mask = std::make_shared<const std::vector<int32_t>>(std::move(mask));
    last_key = key;
    return vectors;
}

namespace {

int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

std::string text(int h, int w) { return std::to_string(h) + "x" + std::to_string(w); }

// Makes a plan in five passes over the network: shapes, geometry, lifetimes, memory, operations.
class Builder {
  public:
    Builder(const Network& network, const PlanKey& key) : network_(network), key_(key) {}

    void build(Plan& plan) {
        scratch_begin_ = round_up(allocate_all(), 16);
        emit(plan);
        plan.arena_floats = scratch_begin_ + scratch_floats_ + 64;
    }

    PlanSummary summary() {
        PlanSummary summary{{}, allocate_all()};
        for (int value : network_.outputs)
            summary.outputs.push_back({nodes_[value].channels, nodes_[value].h, nodes_[value].w});
        return summary;
    }

  private:
    struct Plane {
        int node, channel;
    };
    // A value of the network, or a value split by phase. Nodes of one class (union-find over `parent`) have the same
    // pitch and padding, so that a pixel has the same displacement in all of them.
    struct Node {
        int channels, h, w;
        int parent;
        int buffer;                // the node whose memory it uses; a view has no memory of its own
        std::vector<Plane> view{}; // of a view: the source of each channel
        int first = -1;            // operation that writes the buffer
        int last = -1;             // last operation that reads it
        int64_t offset = 0;
        Geometry geometry{};
    };
    struct Pads {
        int top = 0, bottom = 0, left = 0, right = 0;
    };
    // The phases of a node under a stride, as planes of their own.
    struct Split {
        int node;
        int source;
        Pair stride;
        const WordKernels* words; // packs channels into each plane, or null
        std::map<Phase, int> plane;
    };
    struct Tap {
        int row_phase, column_phase, dy, dx;
    };
    struct Item { // an operation: of a step, or the split of its input, which goes before it
        int step;
        bool splits;
    };
    struct Draft { // what is known of a step before the geometry is
        int x = -1;
        int split = -1;
        std::vector<Tap> taps;
        bool fast_pool = false;
        int large = 0; // of a product: the input that is not a single pixel
    };

    const Network& network_;
    const PlanKey& key_;
    std::vector<Node> nodes_;
    std::vector<Split> splits_;
    std::vector<Draft> drafts_;
    std::vector<Item> items_;
    std::vector<Pads> pads_;
    int64_t scratch_begin_ = 0, scratch_floats_ = 0; // scratch of single operations, behind the tensors

    int64_t allocate_all() {
        shapes();
        geometry();
        lifetimes();
        return memory();
    }

    // -- Shapes: the size of every node, its class, and the padding of each class --

    int root(int node) {
        while (nodes_[node].parent != node) node = nodes_[node].parent = nodes_[nodes_[node].parent].parent;
        return node;
    }

    void tie(int a, int b) {
        a = root(a), b = root(b);
        if (a == b) return;
        nodes_[b].parent = a;
        Pads &p = pads_[a], &q = pads_[b];
        p = {std::max(p.top, q.top), std::max(p.bottom, q.bottom), std::max(p.left, q.left),
             std::max(p.right, q.right)};
    }

    int add_node(int channels, int h, int w) {
        if (h < 1 || w < 1 || h > (1 << 20) || w > (1 << 20))
            fail("a feature map of " + text(h, w) + " pixels is not supported");
        const int number = int(nodes_.size());
        nodes_.push_back({channels, h, w, number, number});
        pads_.push_back({});
        return number;
    }

    // A view of views refers to the planes of nodes with memory directly.
    void add_view(const Step& step) {
        const Node first = nodes_[step.inputs[0]];
        for (int input : step.inputs)
            if (nodes_[input].h != first.h || nodes_[input].w != first.w)
                fail("feature maps of " + text(first.h, first.w) + " and " + text(nodes_[input].h, nodes_[input].w) +
                     " pixels cannot be concatenated");
        const int made = add_node(int(step.planes.size()), first.h, first.w);
        for (const Pair& plane : step.planes) {
            const int node = step.inputs[plane[0]];
            nodes_[made].view.push_back(nodes_[node].view.empty() ? Plane{node, plane[1]}
                                                                  : nodes_[node].view[plane[1]]);
        }
        for (int input : step.inputs) tie(input, made);
    }

    void shapes() {
        drafts_.resize(network_.steps.size());
        // The network's values are the first nodes and keep their numbers.
        for (size_t s = 0; s < network_.steps.size(); ++s) {
            const Step& step = network_.steps[s];
            if (!step.inputs.empty()) drafts_[s].x = step.inputs[0];
            shape(step, drafts_[s]);
            const size_t added = step.kind == Kind::map || step.kind == Kind::conv ? step.inputs.size() : 0;
            for (size_t i = step.kind == Kind::map ? 0 : 1; i < added; ++i) {
                const Node &other = nodes_[step.inputs[i]], &y = nodes_[step.output];
                if (other.h != y.h || other.w != y.w)
                    fail("a residual of " + text(other.h, other.w) + " pixels cannot be added to " + text(y.h, y.w));
                tie(step.inputs[i], step.output);
            }
        }
        for (size_t s = 0; s < network_.steps.size(); ++s) {
            const Step& step = network_.steps[s];
            std::vector<Source> sources;
            const size_t split_count = splits_.size();
            if (step.kind == Kind::conv) {
                for (const auto& group : step.groups)
                    for (const Source& source : Network::sources(step, group.in)) sources.push_back(source);
                window(step, drafts_[s], sources);
            } else if (step.kind == Kind::pool) {
                // A pad counts as 0: correct for a maximum of nonnegative numbers, and for an average with the same
                // divisor for every window.
                const bool zeros = step.average ? !step.ceil_mode && (step.include_pad || step.divisor ||
                                                                      (step.padding[0] == 0 && step.padding[1] == 0))
                                                : network_.values[step.inputs[0]].nonnegative;
                drafts_[s].fast_pool = zeros;
                for (int c = 0; c < nodes_[step.inputs[0]].channels; ++c) sources.push_back(one_channel(c));
                if (zeros) window(step, drafts_[s], sources);
            }
            if (splits_.size() > split_count) items_.push_back({int(s), true});
            if (step.kind != Kind::view) items_.push_back({int(s), false});
        }
    }

    void shape(const Step& step, Draft& draft) {
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
                size[a] = output_size(a ? x.w : x.h, step.kernel[a], step.stride[a], step.padding[a], step.dilation[a],
                                      step.ceil_mode);
            if (size[0] < 1 || size[1] < 1)
                fail("an input of " + text(x.h, x.w) + " pixels is too small for a kernel of " +
                     text(step.kernel[0], step.kernel[1]));
            add_node(network_.values[step.output].channels, size[0], size[1]);
            break;
        }
        case Kind::map: add_node(x.channels, x.h, x.w); break;
        case Kind::norm:
            add_node(x.channels, x.h, x.w);
            tie(step.inputs[0], step.output);
            break;
        case Kind::fit: {
            Size size{step.size[0], step.size[1]};
            if (size == Size{0, 0}) size = {x.h * step.factor, x.w * step.factor};
            if (step.inputs.size() == 2) size = {nodes_[step.inputs[1]].h, nodes_[step.inputs[1]].w};
            add_node(x.channels, size.h, size.w);
            break;
        }
        case Kind::product: {
            const Node other = nodes_[step.inputs[1]];
            draft.large = x.h * x.w == 1 && other.h * other.w > 1;
            const Node &large = draft.large ? other : x, &small = draft.large ? x : other;
            if (small.h * small.w > 1 && (small.h != large.h || small.w != large.w))
                fail("feature maps of " + text(x.h, x.w) + " and " + text(other.h, other.w) +
                     " pixels cannot be multiplied");
            add_node(x.channels, large.h, large.w);
            tie(step.inputs[draft.large], step.output);
            if (small.h == large.h && small.w == large.w) tie(step.inputs[!draft.large], step.output);
            break;
        }
        case Kind::adaptive: add_node(x.channels, step.kernel[0], step.kernel[1]); break;
        case Kind::resize:
            add_node(network_.values[step.output].channels, x.h * step.factor + step.pads[0] + step.pads[1],
                     x.w * step.factor + step.pads[2] + step.pads[3]);
            break;
        case Kind::view: add_view(step); break;
        case Kind::linear:
            if (int64_t(x.channels) * x.h * x.w != step.number)
                fail("a linear layer of " + std::to_string(step.number) + " features got " +
                     std::to_string(x.channels) + "x" + text(x.h, x.w));
            add_node(network_.values[step.output].channels, 1, 1);
            break;
        case Kind::output: break;
        }
    }

    // Turns a strided window into one of stride 1 over an input split by phase, and packed into words where the step
    // computes with those.
    void window(const Step& step, Draft& draft, const std::vector<Source>& sources) {
        const Pair stride = step.stride;
        for (int ky = 0; ky < step.kernel[0]; ++ky)
            for (int kx = 0; kx < step.kernel[1]; ++kx) {
                const int y = ky * step.dilation[0] - step.padding[0], x = kx * step.dilation[1] - step.padding[1];
                const int dy = floor_div(y, stride[0]), dx = floor_div(x, stride[1]);
                draft.taps.push_back({y - dy * stride[0], x - dx * stride[1], dy, dx});
            }
        const bool strided = stride[0] > 1 || stride[1] > 1;
        if (strided || step.words) {
            const int source = step.inputs[0];
            for (size_t i = 0; i < splits_.size(); ++i)
                if (splits_[i].source == source && splits_[i].stride == stride && splits_[i].words == step.words)
                    draft.split = int(i);
            if (draft.split < 0) {
                const Node x = nodes_[source];
                const int node = add_node(0, (x.h + stride[0] - 1) / stride[0], (x.w + stride[1] - 1) / stride[1]);
                splits_.push_back({node, source, stride, step.words, {}});
                if (!strided) tie(source, node); // so that whole planes are packed at once
                draft.split = int(splits_.size()) - 1;
            }
            Split& split = splits_[draft.split];
            for (const Tap& tap : draft.taps)
                for (const Source& one : sources)
                    split.plane.emplace(Phase{{tap.row_phase, tap.column_phase}, one}, 0);
            draft.x = split.node;
        }
        tie(draft.x, step.output);
        Pads& pads = pads_[root(draft.x)];
        const Node &x = nodes_[draft.x], &y = nodes_[step.output];
        for (const Tap& tap : draft.taps) {
            pads.top = std::max(pads.top, -tap.dy);
            pads.left = std::max(pads.left, -tap.dx);
            pads.bottom = std::max(pads.bottom, y.h + tap.dy - x.h);
            pads.right = std::max(pads.right, y.w + tap.dx - x.w);
        }
    }

    // -- Geometry: padding and pitch of every node --

    void geometry() {
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
            // The rows below a plane are the rows above the next.
            const int64_t gap = std::max(pads.top, pads.bottom) * g.pitch * I;
            // A last vector that exceeds the plane must not reach the next plane.
            g.plane = round_up(g.h * g.pitch * I + std::max<int64_t>(gap, 16), 16);
            // Planes at a distance of a power of two would all fall into the same few sets of the cache.
            if (g.plane / 16 % 2 == 0) g.plane += 16;
            g.lead = round_up((pads.top * g.pitch + pads.left) * I, 16);
            const int64_t reach = ((g.h - 1 + pads.bottom) * g.pitch + g.w + pads.right) * I + 16;
            g.size = round_up(g.lead + (g.channels - 1) * g.plane + std::max(g.plane, reach), 16);
            if (g.size > std::numeric_limits<int32_t>::max())
                fail("a feature map is larger than 8 GB; use a smaller batch or image");
        }
    }

    // -- Lifetimes and memory of buffers --

    std::set<int> buffers(int node) const {
        std::set<int> found;
        for (const Plane& plane : nodes_[node].view) found.insert(nodes_[plane.node].buffer);
        if (found.empty()) found.insert(nodes_[node].buffer);
        return found;
    }

    void lifetimes() {
        std::vector<int> last_step(nodes_.size(), -1);
        for (size_t s = 0; s < network_.steps.size(); ++s)
            if (network_.steps[s].kind != Kind::view)
                for (int input : network_.steps[s].inputs)
                    for (int buffer : buffers(input)) last_step[buffer] = int(s);
        const auto read = [&](int node, int operation) {
            for (int buffer : buffers(node)) nodes_[buffer].last = operation;
        };
        for (int number = 0; number < int(items_.size()); ++number) {
            const int s = items_[number].step;
            const Step& step = network_.steps[s];
            const Draft& draft = drafts_[s];
            if (items_[number].splits) {
                nodes_[draft.x].first = number;
                read(splits_[draft.split].source, number);
                continue;
            }
            if (draft.x >= 0) read(draft.x, number);
            for (size_t i = 1; i < step.inputs.size(); ++i) read(step.inputs[i], number);
            if (step.output >= 0) {
                Node& y = nodes_[step.output];
                y.first = number;
                // The output may overwrite this input if no later step reads it and the window does not read it now.
                const int candidate = step.kind == Kind::conv && step.inputs.size() == 2 ? step.inputs[1]
                                      : step.kind == Kind::map || step.kind == Kind::norm ? step.inputs[0]
                                      : step.kind == Kind::product                       ? step.inputs[draft.large]
                                                                                         : -1;
                if (candidate >= 0 && nodes_[candidate].view.empty()) {
                    const int buffer = nodes_[candidate].buffer;
                    // A window reads other pixels of it, a view other planes, after they were overwritten.
                    bool read_again = step.kind == Kind::conv && buffers(draft.x).count(buffer);
                    for (int input : step.inputs)
                        if (!nodes_[input].view.empty()) read_again = read_again || buffers(input).count(buffer);
                    if (last_step[buffer] == s && !read_again) {
                        y.buffer = buffer;
                        last_step[buffer] = last_step[step.output];
                    }
                }
                nodes_[y.buffer].last = std::max(nodes_[y.buffer].last, number);
            }
        }
    }

    // Returns the floats of the arena. Of threads that share an image, each computes about the same rows of all maps of
    // a class: where maps of other classes use other memory, those rows stay in its own cache from call to call, as
    // long as all of them fit.
    int64_t memory() {
        constexpr int64_t cache = (int64_t(1) << 20) / sizeof(float);
        int64_t total = key_.threads > 1 ? offsets(true) : 0;
        if (total == 0 || total > cache) total = offsets(false);
        // Displacements are relative to the beginning of the arena.
        if (total > std::numeric_limits<int32_t>::max() - 64)
            fail("the feature maps need more than 8 GB; use a smaller image");
        return total + 64;
    }

    // Gives every buffer its offset, first fit; returns the end of the last. apart: classes share no memory.
    int64_t offsets(bool apart) {
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
                if (nodes_[other].last >= node.first || (apart && root(other) != root(n)))
                    taken.push_back({nodes_[other].offset, nodes_[other].offset + nodes_[other].geometry.size});
            std::sort(taken.begin(), taken.end());
            int64_t offset = 16; // load_halves() of the first plane reads half a vector before it
            for (const auto& range : taken) {
                if (range.first - offset >= node.geometry.size) break;
                offset = std::max(offset, range.second);
            }
            node.offset = offset;
            placed.push_back(n);
            total = std::max(total, offset + node.geometry.size);
        }
        return total;
    }

    // -- Operations --

    Place place(int node) const {
        const auto first_pixel = [&](int n) { return nodes_[nodes_[n].buffer].offset + nodes_[n].geometry.lead; };
        const Node& own = nodes_[node];
        Place place{own.geometry, {}};
        for (int c = 0; c < own.channels; ++c) {
            const Plane plane = own.view.empty() ? Plane{node, c} : own.view[c];
            place.planes.push_back(first_pixel(plane.node) + plane.channel * nodes_[plane.node].geometry.plane);
        }
        return place;
    }

    void emit(Plan& plan) {
        for (const Item& item : items_) {
            const Step& step = network_.steps[item.step];
            const Draft& draft = drafts_[item.step];
            Op op = item.splits ? split(splits_[draft.split]) : operation(step, draft);
            // A convolution is cut into its chunks already.
            const bool cut = step.kind == Kind::conv && !item.splits;
            op.chunks = cut ? op.units : std::clamp(op.units, 1, key_.parts());
            op.made = item.splits ? -1 : step.output;
            if (!op.work)
                op.work = [whole = work_of(item), units = double(op.units)](int first, int last) {
                    Work work = whole;
                    for (double& count : work.counts) count *= (last - first) / units;
                    return work;
                };
            plan.ops.push_back(std::move(op));
        }
    }

    // Of an operation that is no convolution.
    Work work_of(const Item& item) const {
        const Step& step = network_.steps[item.step];
        const Draft& draft = drafts_[item.step];
        Work work;
        const auto floats = [&](int node) {
            const Geometry& g = nodes_[node].geometry;
            return double(g.channels) * g.h * g.pitch * g.interleave;
        };
        if (item.splits) {
            work[Count::traffic] = work[Count::fresh] = floats(draft.x);
            work[key_.interleave < 4 ? Count::gathered : Count::thinned] = floats(draft.x);
            work[Count::cleared] = nodes_[draft.x].channels;
            work[Count::thin_rows] = double(nodes_[draft.x].channels) * nodes_[draft.x].h;
            return work;
        }
        const int made = step.output >= 0 ? step.output : step.inputs[0];
        const double out = floats(made), lanes = network_.kernels.lanes;
        const double taps = double(step.kernel[0]) * step.kernel[1];
        work[Count::cleared] = step.output >= 0 ? nodes_[made].channels : 0;
        work[Count::traffic] = work[Count::fresh] = out;
        switch (step.kind) {
        case Kind::input:
        case Kind::output: work[key_.interleave > 1 ? Count::interleaved : Count::copied] = out; break;
        case Kind::map:
        case Kind::product: work[Count::mapped] = out / lanes * (double(step.inputs.size()) + 1.0); break;
        case Kind::pool:
            work[draft.fast_pool ? Count::pooled : Count::averaged] = out * taps;
            if (!draft.fast_pool) work[Count::windows] = out / key_.interleave;
            break;
        case Kind::adaptive:
            work[Count::averaged] = work[Count::traffic] = floats(draft.x);
            work[Count::windows] = out / key_.interleave;
            break;
        case Kind::resize: work[Count::mapped] = 4.0 * out / lanes; break;
        case Kind::linear:
            work[Count::held] = double(step.weights.size());
            work[Count::multiplied] = double(step.weights.size()) * key_.interleave;
            break;
        default: break;
        }
        return work;
    }

    Op operation(const Step& step, const Draft& draft) {
        const Kernels& kernels = network_.kernels;
        const auto input = [&](size_t i) { return place(step.inputs[i]); };
        switch (step.kind) {
        case Kind::input: return load(place(step.output), step.number, used_channels(step.output));
        case Kind::conv: return conv(step, draft);
        case Kind::map:
        case Kind::product: {
            const auto other = step.inputs.size() == 2 ? std::optional(input(!draft.large)) : std::nullopt;
            return map(kernels, step, input(draft.large), other, place(step.output));
        }
        case Kind::pool: return pool(step, draft);
        case Kind::adaptive: return slow_pool(step, input(0), place(step.output));
        case Kind::resize: return resize(step, input(0), place(step.output));
        case Kind::fit: return fit(step, input(0), place(step.output));
        case Kind::norm: return norm(kernels, step, input(0), place(step.output));
        case Kind::linear: return linear(kernels, step, input(0), place(step.output));
        default: return store(input(0), step.number);
        }
    }

    Op split(const Split& split) const {
        return dsp::split(network_.kernels, place(split.source), place(split.node), split.stride, split.words,
                          {split.plane.begin(), split.plane.end()});
    }

    // Which channels of a value are read: only a convolution or a view can skip some.
    std::vector<char> used_channels(int value) const {
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

    std::vector<int32_t> displacements(const Draft& draft, const std::vector<Source>& sources) const {
        const Place x = place(draft.x);
        std::vector<int32_t> off;
        for (const Source& one : sources)
            for (const Tap& tap : draft.taps) {
                const Phase phase{{tap.row_phase, tap.column_phase}, one};
                const int plane = draft.split < 0 ? one[0] : splits_[draft.split].plane.at(phase);
                off.push_back(int32_t(x.planes[plane] + x.geometry.at(0, tap.dy, tap.dx)));
            }
        return off;
    }

    Op conv(const Step& step, const Draft& draft) {
        auto made = std::make_unique<Conv>(network_.kernels, step, place(draft.x), place(step.output));
        if (step.inputs.size() == 2) {
            const int added = step.inputs[1];
            made->add = place(added);
            made->in_place = nodes_[step.output].buffer == nodes_[added].buffer;
            made->skip_absent = made->in_place && !step.requantize &&
                                (step.act == Act::none ||
                                 (step.act == Act::relu && network_.values[added].nonnegative));
        }
        for (const auto& group : step.groups)
            made->off.push_back(displacements(draft, Network::sources(step, group.in)));
        std::set<int> rows;
        for (const Tap& tap : draft.taps) rows.insert(tap.dy);
        return tile_conv(network_, key_, std::move(made), int(rows.size()), draft.split >= 0, scratch_begin_,
                         scratch_floats_);
    }

    Op pool(const Step& step, const Draft& draft) const {
        if (!draft.fast_pool) return slow_pool(step, place(step.inputs[0]), place(step.output));
        // Displacements from plane c to plane c + 1 are the same for all taps only if every phase has its own run
        // of planes; they are sorted by phase, then channel, and all channels are present.
        Place x = place(draft.x);
        auto off = displacements(draft, {one_channel(0)});
        for (int32_t& one : off) one -= int32_t(x.planes[0]);
        return fast_pool(network_.kernels, step, std::move(x), place(step.output), std::move(off));
    }
};

} // namespace

PlanSummary summarize(const Network& network, const PlanKey& key) { return Builder(network, key).summary(); }

Plan::Plan(const Network& network, const PlanKey& key) : key(key) { Builder(network, this->key).build(*this); }

} // namespace dsp
