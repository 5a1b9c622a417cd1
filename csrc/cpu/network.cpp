#include "network.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
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

void check_integers(const std::vector<float>& weights, int64_t terms) {
    for (float w : weights)
        require(w >= -127.0f && w <= 127.0f && w == float(int(w)), "a weight is no integer of 8 bits");
    require(terms <= std::numeric_limits<int32_t>::max() / (127 * 255), "an integer sum would exceed 32 bits");
}

// -- How the sums of a convolution are computed --

// Most rows of words for one product of matrices: they are gathered into scratch memory.
constexpr int64_t most_rows = 1 << 14;

// Estimated times of a vector of output pixels, in those of a float multiply-add. Packing a word takes about 8 (cycles
// on Zen 4) for each phase of a stride. On Sapphire Rapids a product of matrices takes 32 (16 cycles) and gathering a
// row of words 13, one while the other runs.
struct Times {
    double floats = 0, words = 0, matrices = 0;
};

Times times_of(const Window& window, const GroupIndex& group, const WordKernels& kernels) {
    int64_t phases = 1, taps = 1;
    for (int a = 0; a < 2; ++a) phases *= std::min(window.stride[a], window.kernel[a]), taps *= window.kernel[a];
    const int64_t in = int64_t(group.in.size()), out = int64_t(group.out.size());
    const int64_t words = (in + kernels.channels - 1) / kernels.channels, rows = words * taps;
    const double pack = 8.0 * double(words * phases);
    const double products = 32.0 * double((out + 15) / 16 * ((rows + 15) / 16)), gathering = 13.0 * double(rows);
    return {double(in * out * taps), pack + kernels.product * double(rows * out),
            rows > most_rows ? std::numeric_limits<double>::infinity() : pack + std::max(products, gathering)};
}

Times times_of(const Window& window, const std::vector<GroupIndex>& groups, const WordKernels& kernels) {
    Times sum;
    for (const GroupIndex& group : groups) {
        const Times one = times_of(window, group, kernels);
        sum.floats += one.floats, sum.words += one.words, sum.matrices += one.matrices;
    }
    return sum;
}

// One group for the channels of two, with zeros for weights that they do not have; taps 0: without weights.
GroupIndex merged(const GroupIndex& a, const GroupIndex& b, int64_t taps) {
    GroupIndex made{{}, a.out, {}};
    made.out.insert(made.out.end(), b.out.begin(), b.out.end());
    std::set<int> in(a.in.begin(), a.in.end());
    in.insert(b.in.begin(), b.in.end());
    made.in.assign(in.begin(), in.end());
    made.weights.assign(made.out.size() * made.in.size() * taps, 0.0f);
    float* filter = made.weights.data();
    for (const GroupIndex* group : {&a, &b})
        for (size_t o = 0; taps > 0 && o < group->out.size(); ++o, filter += made.in.size() * taps)
            for (size_t i = 0; i < group->in.size() && !group->weights.empty(); ++i) {
                const auto at = std::lower_bound(made.in.begin(), made.in.end(), group->in[i]) - made.in.begin();
                std::copy_n(&group->weights[(o * group->in.size() + i) * taps], taps, filter + at * taps);
            }
    return made;
}

// Groups for products of matrices: two become one where that takes less time.
std::vector<GroupIndex> merge(const Window& window, std::vector<GroupIndex> groups, const WordKernels& kernels) {
    constexpr size_t most_groups = 16; // all pairs are tried after each merger
    const int64_t taps = int64_t(window.kernel[0]) * window.kernel[1];
    const auto time = [&](const GroupIndex& group) { return times_of(window, group, kernels).matrices; };
    for (const GroupIndex& group : groups) // a sum of weights would not fit a byte
        if (std::set<int>(group.in.begin(), group.in.end()).size() < group.in.size()) return groups;
    while (groups.size() <= most_groups) {
        size_t first = 0, second = 0;
        double best = 0.0;
        for (size_t a = 0; a < groups.size(); ++a)
            for (size_t b = a + 1; b < groups.size(); ++b) {
                const double gain = time(groups[a]) + time(groups[b]) - time(merged(groups[a], groups[b], 0));
                if (gain > best) best = gain, first = a, second = b;
            }
        if (best == 0.0) break;
        groups[first] = merged(groups[first], groups[second], taps);
        groups.erase(groups.begin() + int64_t(second));
    }
    return groups;
}

constexpr float most_level = 1 << 22;

bool is_folded(Act act) { return act < Act::sigmoid; }

// Requantizer in kernels/impl.h rounds right only within such bounds.
void check_ending(const Requantize& end, size_t numbers, Act act) {
    require(end.multiplier.size() == numbers, "requantize needs one multiplier per output channel");
    require(end.low <= 0.0f && end.high >= 0.0f && end.round == (end.low > -most_level) &&
                end.round == (end.high < most_level),
            "requantize clamps to integers around 0, or to no bounds");
    require(act <= Act::relu6, "an integer step cannot end in a SiLU or hardswish");
}

// -- Channels in one word --

// Puts each group's channels, and its weights with them, in an order whose neighbours, by twos or fours, share a word:
// a plane of words is made once per pair or four. Channels that exactly the same groups read share all their planes:
// ResNet-56 g=4 has 889 planes of pairs instead of 2081; pairing the rest by most readers, 868.
void order_by_words(std::vector<GroupIndex>& groups, int64_t taps, size_t width) {
    std::map<int, std::vector<int>> readers; // of each channel
    for (size_t g = 0; g < groups.size(); ++g)
        for (int c : std::set<int>(groups[g].in.begin(), groups[g].in.end())) readers[c].push_back(int(g));
    std::vector<std::vector<int>> order(groups.size());
    std::map<std::vector<int>, std::vector<int>> waiting; // readers -> channels that fill no word
    for (const auto& [channel, of] : readers) {
        std::vector<int>& some = waiting[of];
        some.push_back(channel);
        if (some.size() < width) continue;
        for (int g : of) order[g].insert(order[g].end(), some.begin(), some.end());
        some.clear();
    }
    for (const auto& [of, some] : waiting)
        for (int g : of) order[g].insert(order[g].end(), some.begin(), some.end());
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
void pack_plain(Weights& to, const Step& step, const float* first, int filters, int64_t count, int64_t taps) {
    const int width = step.words ? step.words->channels : 1;
    for (int64_t c = 0; c < count; c += width * taps)
        for (int64_t j = c; j < c + taps; ++j) {
            float part[max_word][max_filters] = {}, made[max_filters];
            for (int i = 0; i < width; ++i)
                for (int k = 0; k < filters && j + i * taps < count; ++k) part[i][k] = first[k * count + j + i * taps];
            const float* const rows[max_word] = {part[0], part[1], part[2], part[3]};
            if (width == 4) // a weight is a byte with sign
                for (int k = 0; k < filters; ++k) {
                    uint32_t word = 0;
                    for (int i = 0; i < 4; ++i) word |= uint32_t(uint8_t(int8_t(part[i][k]))) << 8 * i;
                    std::memcpy(&made[k], &word, sizeof word);
                }
            else if (width == 2)
                step.words->pack(rows, made, filters, 1, 1);
            to.insert(to.end(), width == 1 ? part[0] : made, (width == 1 ? part[0] : made) + filters);
        }
}

// For products of matrices: [matrices][matrices of filters][16 filters][16 words], words of one tap after the other.
void pack_matrices(Weights& to, const Step& step, const float* first, int filters, int64_t count, int64_t taps,
                   Form form) {
    const size_t begin = to.size();
    Weights words;
    for (int k = 0; k < filters; ++k) {
        words.clear();
        pack_plain(words, step, first + k * count, 1, count, taps); // taps of one word after the other
        const int64_t rows = int64_t(words.size()), each = (filters + 15) / 16;
        const int height = matrix_height(rows / taps, form);
        if (k == 0) to.resize(begin + (rows + height - 1) / height * each * 256, 0.0f);
        for (int64_t j = 0; j < rows; ++j) {
            const int64_t row = j % taps * (rows / taps) + j / taps;
            to[begin + ((row / height * each + k / 16) * 16 + k % 16) * 16 + row % height] = words[j];
        }
    }
}

// By Winograd's method: [sum][channel, horizontal tap][filters]; of patches [sum][channel][filters].
void pack_sums(Weights& to, bool patches, const float* first, int filters, int64_t count, int columns) {
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

int Network::make(Step step, int channels, bool nonnegative, std::optional<Requantize> requantize) {
    if (requantize) {
        const bool filters = step.kind == Kind::conv || step.kind == Kind::linear;
        check_ending(*requantize, filters ? channels : 1, step.act);
        if (!requantize->round && rectifies(step.act)) requantize->low = 0.0f;
        if (!requantize->round && step.act == Act::relu6) requantize->high = 6.0f;
        nonnegative = requantize->low == 0.0f;
        if (step.kind == Kind::linear) requantize->multiplier.resize(step.bias.size(), 0.0f);
        step.requantize = std::move(requantize);
    }
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
                      std::vector<GroupIndex> groups, const std::vector<float>& bias,
                      std::optional<Requantize> requantize) {
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
        if (requantize) check_integers(groups[g].weights, int64_t(groups[g].in.size()) * taps);
    }
    Step step(Kind::conv, residual >= 0 ? std::vector<int>{x, residual} : std::vector<int>{x}, act);
    static_cast<Window&>(step) = window;
    for (int o = 0; o < out_channels; ++o)
        if (!written[o]) step.absent.push_back(o);
    step.bias = bias;
    step.bias.resize(out_channels, 0.0f);
    step.groups = std::move(groups);
    const double price = kernels.matrices.price;
    if (requantize) {
        const WordKernels& quads = kernels.quads[requantize->is_signed];
        if (quads.own && !requantize->exact) {
            const Times times = times_of(window, step.groups, quads);
            if (times.words < times.floats) step.words = &quads;
            if (price > 0.0) {
                // What a filter does not read, it may read times 0, because integers are finite.
                auto fewer = merge(window, step.groups, quads);
                step.matrices = price * times_of(window, fewer, quads).matrices < std::min(times.words, times.floats);
                if (step.matrices) step.words = &quads, step.groups = std::move(fewer);
            }
        }
    } else if (std::any_of(step.groups.begin(), step.groups.end(),
                           [](const GroupIndex& group) { return group.in.size() > 1; })) {
        step.words = words; // with one channel per group, as in a depthwise convolution, a word would be half empty
        if (words && words->matrix[1][1]) {
            const Times times = times_of(window, step.groups, *words);
            step.matrices = price * times.matrices < times.words;
        }
    }
    if (step.words) order_by_words(step.groups, taps, step.words->channels);
    return make(std::move(step), out_channels, rectifies(act), std::move(requantize));
}

std::vector<Source> Network::sources(const Step& step, const std::vector<int>& channels) {
    std::vector<Source> list;
    const size_t width = step.words ? step.words->channels : 1;
    for (size_t i = 0; i < channels.size(); i += width) {
        list.push_back(one_channel(-1));
        for (size_t n = i; n < std::min(i + width, channels.size()); ++n) list.back()[n - i] = channels[n];
    }
    return list;
}

int Network::add_map(int x, int other, std::vector<float> scale, std::vector<float> shift, Act act,
                     std::optional<Requantize> requantize) {
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
    require(scale.empty() || !requantize, "an integer step has one multiplier instead of scales");
    step.scale = std::move(scale), step.shift = std::move(shift);
    return make(std::move(step), channels, rectifies(act), std::move(requantize));
}

int Network::add_pool(int x, Pooling kind, const Window& window, bool ceil_mode, bool include_pad, int divisor,
                      std::optional<Requantize> requantize) {
    check(x);
    check_window(window);
    require(2 * window.padding[0] <= window.kernel[0] && 2 * window.padding[1] <= window.kernel[1],
            "pool padding is more than half the kernel");
    require(divisor >= 0, "the divisor is negative");
    Step step(Kind::pool, {x});
    static_cast<Window&>(step) = window;
    step.average = kind == Pooling::avg_pool, step.ceil_mode = ceil_mode;
    step.include_pad = include_pad, step.divisor = divisor;
    require(!requantize || step.average, "a maximum of integers needs no multiplier");
    return make(std::move(step), values[x].channels, values[x].nonnegative, std::move(requantize));
}

int Network::add_product(int x, int other, Act act, std::optional<Requantize> requantize) {
    check(x);
    check(other);
    require(values[x].channels == values[other].channels, "the two factors have different numbers of channels");
    const bool nonnegative = act == Act::none && values[x].nonnegative && values[other].nonnegative;
    return make(Step(Kind::product, {x, other}, act), values[x].channels, rectifies(act) || nonnegative,
                std::move(requantize));
}

int Network::add_adaptive(int x, Pair size, std::optional<Requantize> requantize) {
    check(x);
    require(size[0] >= 1 && size[1] >= 1 && size[0] < 4096 && size[1] < 4096,
            "the output of an adaptive pool has 1 to 4095 rows and columns");
    Step step(Kind::adaptive, {x});
    step.kernel = size, step.average = true;
    return make(std::move(step), values[x].channels, values[x].nonnegative, std::move(requantize));
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

int Network::add_fit(int x, int like, Fit fit, Pair size, int factor) {
    check(x);
    if (like >= 0) check(like);
    require(size[0] >= 0 && size[1] >= 0 && factor >= 1 && factor < 4096, "the size or factor is out of range");
    Step step(Kind::fit, like >= 0 ? std::vector<int>{x, like} : std::vector<int>{x});
    step.fit = fit, step.size = size, step.factor = factor;
    return make(std::move(step), values[x].channels, values[x].nonnegative);
}

int Network::add_norm(int x, int groups, float epsilon, std::vector<float> scale, std::vector<float> shift, Act act) {
    check(x);
    const int channels = values[x].channels;
    require(groups >= 1 && channels % groups == 0, "the channels are no multiple of the groups");
    require(int(scale.size()) == channels && int(shift.size()) == channels,
            "scale and shift need one number per channel");
    Step step(Kind::norm, {x}, act);
    step.number = groups, step.value = epsilon, step.scale = std::move(scale), step.shift = std::move(shift);
    return make(std::move(step), channels, rectifies(act));
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
                        int in_features, Act act, std::optional<Requantize> requantize) {
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
    if (requantize) check_integers(weight, in_features);
    return make(std::move(step), out_features, rectifies(act), std::move(requantize));
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
            else if (form == Form::matrices || form == Form::matrices_in_place)
                pack_matrices(made->weights, step, weights, filters, count, taps, form);
            else if (form == Form::plain)
                pack_plain(made->weights, step, weights, filters, count, taps);
            else
                pack_sums(made->weights, form == Form::patches, weights, filters, count, step.kernel[1]);
            for (int k = 0; k < filters; ++k) {
                tile.channels.push_back(group.out[first + k]);
                made->bias.push_back(step.bias[tile.channels.back()]);
                if (!step.requantize) continue;
                made->multiplier.push_back(step.requantize->multiplier[tile.channels.back()]);
                const int64_t known = group.weights.empty() ? 0 : count; // only planned
                const float sum = std::accumulate(weights + k * known, weights + (k + 1) * known, 0.0f);
                made->start.push_back(step.words && step.words->zero ? -128 * int32_t(sum) : 0);
            }
            first += filters;
            made->tiles.push_back(std::move(tile));
        }
    }
    known = made;
    return made;
}

} // namespace dsp
