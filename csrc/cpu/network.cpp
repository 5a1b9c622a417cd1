#include "network.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <stdexcept>

#include "kernels/winograd.h"

namespace dsp {

void fail(const std::string& message) { throw std::invalid_argument(message); }

namespace {

constexpr int64_t most = int64_t(1) << 24; // limit of channels, taps and sizes

void require(bool good, const std::string& message) {
    if (!good) fail(message);
}

void check_window(const Window& w) {
    for (int a = 0; a < 2; ++a)
        require(std::min({w.kernel[a], w.stride[a], w.dilation[a], w.padding[a] + 1}) >= 1 &&
                    std::max({w.kernel[a], w.stride[a], w.dilation[a], w.padding[a]}) < 4096,
                "kernel size, stride and dilation are at least 1, padding at least 0, all below 4096");
}

bool rectifies(Act act) { return act == Act::relu || act == Act::relu6; }

bool is_folded(Act act) { return act < Act::sigmoid; }

// -- Pairs of channels in one word --

// Puts each group's channels, and its weights with them, in an order whose neighbours, 1st and 2nd, 3rd and 4th and so
// on, are pairs: a plane of words is made once per pair. Channels that exactly the same groups read share all their
// planes: ResNet-56 g=4 has 889 planes instead of 2081; pairing the rest by most readers, 868.
void order_by_pairs(std::vector<GroupIndex>& groups, int64_t taps) {
    std::map<int, std::vector<int>> readers; // of each channel
    for (size_t g = 0; g < groups.size(); ++g)
        for (int c : std::set<int>(groups[g].in.begin(), groups[g].in.end())) readers[c].push_back(int(g));
    std::vector<std::vector<int>> order(groups.size());
    std::map<std::vector<int>, int> waiting; // readers -> a channel without a partner
    for (const auto& [channel, of] : readers) {
        const auto [partner, alone] = waiting.emplace(of, channel);
        if (alone) continue;
        for (int g : of) order[g].insert(order[g].end(), {partner->second, channel});
        waiting.erase(partner);
    }
    for (const auto& [of, channel] : waiting)
        for (int g : of) order[g].push_back(channel);
    for (size_t g = 0; g < groups.size(); ++g) {
        GroupIndex& group = groups[g];
        if (order[g].size() != group.in.size()) continue; // a channel is read twice
        std::map<int, int64_t> position;
        for (size_t i = 0; i < group.in.size(); ++i) position[group.in[i]] = int64_t(i);
        const std::vector<float> before = std::move(group.weights);
        group.in = order[g];
        if (before.empty()) continue; // it is only planned
        group.weights.clear();
        for (size_t o = 0; o < group.out.size(); ++o)
            for (int c : group.in) {
                const float* kernel = before.data() + (int64_t(o * group.in.size()) + position[c]) * taps;
                group.weights.insert(group.weights.end(), kernel, kernel + taps);
            }
    }
}

// -- Packed weights --

// The weights of one tile for plain sums: floats, or words rounded by the kernels.
void pack_plain(std::vector<float>& to, const Step& step, const float* first, int filters, int64_t count,
                int64_t taps) {
    for (int64_t c = 0; c < count; c += step.pairs ? 2 * taps : taps)
        for (int64_t j = c; j < c + taps; ++j) {
            float one[max_filters], other[max_filters];
            for (int k = 0; k < filters; ++k) {
                const float* filter = first + k * count;
                one[k] = filter[j], other[k] = j + taps < count ? filter[j + taps] : 0.0f;
            }
            if (step.pairs) step.pairs->pair(one, other, one, filters, 1, 1);
            to.insert(to.end(), one, one + filters);
        }
}

// By Winograd's method: [sum][channel, horizontal tap][filters]; of patches [sum][channel][filters].
void pack_sums(std::vector<float>& to, bool patches, const float* first, int filters, int64_t count, int columns) {
    for (int sum = 0; sum < (patches ? patch_sums : band_sums); ++sum)
        for (int64_t c = 0; c < count; c += 3 * columns)
            for (int64_t x = c; x < c + (patches ? 1 : columns); ++x)
                for (int k = 0; k < filters; ++k) {
                    const float* tap = first + k * count + x;
                    const int row = patches ? sum / column_sums : sum;
                    const auto column = [&](int x) {
                        return band_weight(row, tap[x], tap[columns + x], tap[2 * columns + x]);
                    };
                    to.push_back(float(patches ? patch_weight(sum % column_sums, column(0), column(1), column(2))
                                               : column(0)));
                }
}

} // namespace

const WordKernels* words_of(const Kernels& kernels, Precision precision) {
    if (precision == Precision::bfloat16) return &kernels.bf16;
    return precision == Precision::float16 && kernels.fp16.own ? &kernels.fp16 : nullptr;
}

Network::Network(const std::string& isa, Precision precision, Winograd winograd)
    : kernels(kernels_for(isa)), words(words_of(kernels, precision)), winograd(winograd) {}

void Network::check(int value) const {
    require(value >= 0 && value < int(values.size()), "value " + std::to_string(value) + " does not exist");
}

int Network::make(Step step, int channels, bool nonnegative) {
    require(channels >= 1 && channels < most, "a value has " + std::to_string(channels) + " channels");
    values.push_back({channels, nonnegative});
    step.output = int(values.size()) - 1;
    steps.push_back(std::move(step));
    return steps.back().output;
}

int Network::add_input(int channels) {
    Step step(Kind::input);
    step.number = int(inputs.size());
    inputs.push_back(make(std::move(step), channels, false));
    return inputs.back();
}

int Network::add_conv(int x, int residual, int out_channels, const Window& window, Act act,
                      std::vector<GroupIndex> groups, const std::vector<float>& bias) {
    check(x);
    check_window(window);
    require(out_channels >= 1 && out_channels < most, "out_channels is " + std::to_string(out_channels));
    if (residual >= 0) {
        check(residual);
        require(values[residual].channels == out_channels, "the residual has a different number of channels");
    }
    require(is_folded(act), "a convolution cannot end in an activation that changes 0 or in a GELU");
    require(bias.empty() || int(bias.size()) == out_channels, "bias needs one number per output channel");
    const int64_t taps = int64_t(window.kernel[0]) * window.kernel[1];
    std::vector<char> written(out_channels, 0);
    for (size_t g = 0; g < groups.size(); ++g) {
        for (int c : groups[g].in)
            require(c >= 0 && c < values[x].channels, "in_index " + std::to_string(c) + " is out of range");
        for (int o : groups[g].out) {
            require(o >= 0 && o < out_channels, "out_index " + std::to_string(o) + " is out of range");
            require(!written[o], "output channel " + std::to_string(o) + " is written twice");
            written[o] = 1;
        }
        const int64_t expected = int64_t(groups[g].in.size()) * int64_t(groups[g].out.size()) * taps;
        if (groups[g].weights.empty() && expected > 0) runs = false;
        require(groups[g].weights.empty() || int64_t(groups[g].weights.size()) == expected,
                "group " + std::to_string(g) + " has a weight of the wrong size");
    }
    Step step(Kind::conv, residual >= 0 ? std::vector<int>{x, residual} : std::vector<int>{x}, act);
    static_cast<Window&>(step) = window;
    for (int o = 0; o < out_channels; ++o)
        if (!written[o]) step.absent.push_back(o);
    step.bias = bias;
    step.bias.resize(out_channels, 0.0f);
    step.groups = std::move(groups);
    // With one channel per group, as in a depthwise convolution, a pair would be half empty.
    if (std::any_of(step.groups.begin(), step.groups.end(),
                    [](const GroupIndex& group) { return group.in.size() > 1; }))
        step.pairs = words;
    if (step.pairs) order_by_pairs(step.groups, taps);
    return make(std::move(step), out_channels, rectifies(act));
}

std::vector<Source> Network::sources(const Step& step, const std::vector<int>& channels) {
    std::vector<Source> list;
    const size_t width = step.pairs ? 2 : 1;
    for (size_t i = 0; i < channels.size(); i += width)
        list.push_back({channels[i], step.pairs && i + 1 < channels.size() ? channels[i + 1] : -1});
    return list;
}

int Network::add_map(int x, int other, std::vector<float> scale, std::vector<float> shift, Act act) {
    check(x);
    const int channels = values[x].channels;
    require(scale.size() == shift.size() && (scale.empty() || int(scale.size()) == channels),
            "scale and shift need one number per channel");
    Step step(Kind::map, {x}, act);
    if (other >= 0) {
        check(other);
        require(values[other].channels == channels, "the two operands have different numbers of channels");
        step.inputs.push_back(other);
    }
    step.scale = std::move(scale), step.shift = std::move(shift);
    return make(std::move(step), channels, rectifies(act));
}

int Network::add_pool(int x, Pooling kind, const Window& window, bool ceil_mode, bool include_pad, int divisor) {
    check(x);
    check_window(window);
    require(2 * window.padding[0] <= window.kernel[0] && 2 * window.padding[1] <= window.kernel[1],
            "pool padding is more than half the kernel");
    require(divisor >= 0, "the divisor is negative");
    Step step(Kind::pool, {x});
    static_cast<Window&>(step) = window;
    step.average = kind == Pooling::avg_pool, step.ceil_mode = ceil_mode;
    step.include_pad = include_pad, step.divisor = divisor;
    return make(std::move(step), values[x].channels, values[x].nonnegative);
}

int Network::add_product(int x, int other, Act act) {
    check(x);
    check(other);
    require(values[x].channels == values[other].channels, "the two factors have different numbers of channels");
    const bool nonnegative = act == Act::none && values[x].nonnegative && values[other].nonnegative;
    return make(Step(Kind::product, {x, other}, act), values[x].channels, rectifies(act) || nonnegative);
}

int Network::add_adaptive(int x, Pair size) {
    check(x);
    require(size[0] >= 1 && size[1] >= 1 && size[0] < 4096 && size[1] < 4096,
            "the output of an adaptive pool has 1 to 4095 rows and columns");
    Step step(Kind::adaptive, {x});
    step.kernel = size, step.average = true;
    return make(std::move(step), values[x].channels, values[x].nonnegative);
}

int Network::add_resize(int x, int factor, bool shuffle, std::array<int, 4> pads, float value) {
    check(x);
    const int channels = values[x].channels, each = shuffle ? factor * factor : 1;
    require(factor >= 1 && factor < 4096 && channels % each == 0, "the factor does not fit the channels");
    for (int pad : pads) require(pad > -4096 && pad < 4096, "a pad has more than 4095 pixels");
    Step step(Kind::resize, {x});
    step.factor = factor, step.shuffle = shuffle, step.pads = pads, step.value = value;
    return make(std::move(step), channels / each, values[x].nonnegative && value >= 0.0f);
}

int Network::add_view(std::vector<int> parts, std::vector<Pair> planes) {
    require(!planes.empty() && int64_t(planes.size()) < most, "a view needs a channel");
    bool nonnegative = true;
    for (int part : parts) nonnegative = nonnegative && values[part].nonnegative;
    Step step(Kind::view, std::move(parts));
    step.planes = std::move(planes);
    const int channels = int(step.planes.size());
    return make(std::move(step), channels, nonnegative);
}

int Network::add_select(int x, const std::vector<int>& channels) {
    check(x);
    std::vector<Pair> planes;
    for (int c : channels) {
        require(c >= 0 && c < values[x].channels, "channel " + std::to_string(c) + " is out of range");
        planes.push_back({0, c});
    }
    return add_view({x}, std::move(planes));
}

int Network::add_concat(const std::vector<int>& parts) {
    std::vector<Pair> planes;
    for (size_t part = 0; part < parts.size(); ++part) {
        check(parts[part]);
        for (int c = 0; c < values[parts[part]].channels; ++c) planes.push_back({int(part), c});
    }
    return add_view(parts, std::move(planes));
}

int Network::add_linear(int x, int out_features, const std::vector<float>& weight, const std::vector<float>& bias,
                        int in_features, Act act) {
    check(x);
    require(out_features >= 1 && out_features < most && in_features >= 1 &&
                int64_t(weight.size()) == int64_t(out_features) * in_features,
            "the linear weight has the wrong size");
    require(bias.empty() || int(bias.size()) == out_features, "bias needs one number per output");
    require(in_features % values[x].channels == 0, "in_features is not a multiple of the input's channels");
    // Stored transposed, [in][out padded to 16]: the outputs are the vector.
    Step step(Kind::linear, {x}, act);
    step.number = in_features;
    const int64_t pitch = (int64_t(out_features) + 15) / 16 * 16;
    step.weights.assign(pitch * in_features, 0.0f);
    for (int64_t o = 0; o < out_features; ++o)
        for (int64_t i = 0; i < in_features; ++i) step.weights[i * pitch + o] = weight[o * in_features + i];
    step.bias = bias;
    step.bias.resize(pitch, 0.0f);
    return make(std::move(step), out_features, rectifies(act));
}

void Network::add_output(int value) {
    check(value);
    Step step(Kind::output, {value});
    step.number = int(outputs.size());
    outputs.push_back(value);
    steps.push_back(std::move(step));
}

// fork() takes it, so that no child begins with a lock that is held by a thread it does not have.
static std::mutex& packing() {
    static std::mutex mutex;
    static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
    return (void)registered, mutex;
}

std::shared_ptr<const Packed> Network::packed(const Step& step, const Splits& splits, Form form) const {
    std::lock_guard<std::mutex> lock(packing());
    auto& known = packed_[{&step, splits, form}];
    if (auto found = known.lock()) return found;
    auto made = std::make_shared<Packed>();
    for (size_t g = 0; g < step.groups.size(); ++g) {
        const GroupIndex& group = step.groups[g];
        const int64_t taps = int64_t(step.kernel[0]) * step.kernel[1], count = int64_t(group.in.size()) * taps;
        int first = 0;
        for (int filters : splits[g]) {
            FilterTile tile{int(g), filters, int64_t(made->weights.size()), int64_t(made->bias.size()), {}};
            const float* weights = group.weights.data() + first * count;
            if (group.weights.empty())
                ; // only planned
            else if (form == Form::plain)
                pack_plain(made->weights, step, weights, filters, count, taps);
            else
                pack_sums(made->weights, form == Form::patches, weights, filters, count, step.kernel[1]);
            for (int k = 0; k < filters; ++k) {
                tile.channels.push_back(group.out[first + k]);
                made->bias.push_back(step.bias[tile.channels.back()]);
            }
            first += filters;
            made->tiles.push_back(std::move(tile));
        }
    }
    known = made;
    return made;
}

} // namespace dsp
