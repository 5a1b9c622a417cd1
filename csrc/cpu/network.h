// A segment of a Program in native form: values (tensors), steps and weights, without image sizes; a Plan is made per
// image size (plan.h).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/kernel.h"

namespace dsp {

// Instruction sets that this CPU supports, best first (kernels/isa.cpp).
std::vector<std::string> available_isas();
// The kernels of one instruction set; "" is the best. Throws std::invalid_argument if it is unknown or unsupported.
const Kernels& kernels_for(const std::string& isa);

using Pair = std::array<int, 2>; // vertical, horizontal

struct Size {
    int h, w;
    bool operator==(const Size& other) const { return h == other.h && w == other.w; }
};

// Consecutive filters of one group that one microtile, or one product of matrices, computes.
struct FilterTile {
    int group;
    int filters;
    int64_t weights;           // offset of its [count][filters] weights
    int64_t bias;              // offset of its [filters] biases
    std::vector<int> channels; // output channels
};

struct Window {
    Pair kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};
};

// A channel, or the channels of a word (WordKernels); -1 for none.
using Source = std::array<int, max_word>;
inline Source one_channel(int c) { return {c, -1, -1, -1}; }

struct GroupIndex {
    std::vector<int> in, out;
    std::vector<float> weights; // [filters][channels][kh][kw]
};

// Memory in whole lines of the cache.
template <typename T>
struct Lines {
    using value_type = T;
    Lines() = default;
    template <typename U>
    Lines(const Lines<U>&) {}
    static constexpr std::align_val_t line{64};
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), line)); }
    void deallocate(T* p, size_t) { ::operator delete(p, line); }
    friend bool operator==(Lines, Lines) { return true; }
    friend bool operator!=(Lines, Lines) { return false; }
};
using Weights = std::vector<float, Lines<float>>;

// The weights of a convolution in the order in which its microtiles, or products of matrices, read them.
struct Packed {
    std::vector<FilterTile> tiles;
    Weights weights;
    std::vector<float> bias, multiplier; // multiplier, start: of an integer step
    std::vector<int32_t> start;
};
using Splits = std::vector<std::vector<int>>; // sizes of the filter tiles of each group

// How a convolution is summed: directly, by products of matrices (amx.h) whose rows are gathered or read in place, or
// in one of two forms of Winograd's method (winograd.h).
enum class Form { plain, matrices, matrices_in_place, bands, patches };

// Of products of matrices: rows of one of them, when each tap has this many words.
inline int matrix_height(int64_t words, Form form) {
    return form == Form::matrices_in_place && words > 0 && words < 16 ? int(words) : 16;
}

enum class Kind { input, conv, map, norm, product, pool, adaptive, resize, fit, view, linear, output };

// How a map gets another size; corners: bilinear, corner pixels on corner pixels; pads: of zeros, cut where negative.
DSP_ENUM(Fit, nearest, bilinear, corners, pad_end, pad_around)

// How an integer step ends, as Python's Requantize.
struct Requantize : Ending {
    std::vector<float> multiplier; // of a conv or linear layer one per output, otherwise one
    bool exact, is_signed;
};

struct Step : Window { // of a conv or pool
    explicit Step(Kind kind, std::vector<int> inputs = {}, Act act = Act::none)
        : kind(kind), inputs(std::move(inputs)), act(act) {}
    Kind kind;
    std::vector<int> inputs; // values
    int output = -1;         // value
    Act act;
    std::optional<Requantize> requantize{}; // of an integer step
    // conv
    std::vector<GroupIndex> groups;
    std::vector<int> absent;
    const WordKernels* words = nullptr; // computes it several channels at a time; null: in float
    bool matrices = false;              // by products of matrices of words
    std::vector<float> weights, bias;   // linear: [in][out padded]; conv: the bias of each output channel
    // pool
    bool average = false, ceil_mode = false, include_pad = true;
    int divisor = 0; // 0: the size of the window
    // resize; pads: top, bottom, left, right
    int factor = 1;
    bool shuffle = false;
    std::array<int, 4> pads{};
    float value = 0.0f;
    // fit; size: of the result, or zeros for `factor` times the input's, unless there is a second input of its size
    Fit fit = Fit::nearest;
    Pair size{};
    // view: per channel, the input (an index into `inputs`) and its channel
    std::vector<Pair> planes;
    // map: per channel, or empty; norm: per channel, and epsilon as `value`
    std::vector<float> scale, shift;
    int number = 0; // of an input or output; of a linear layer its input features; of a norm its groups
};

struct Value {
    int channels;
    bool nonnegative = false; // a ReLU computed it, so another ReLU is a no-op
};

// Whether convolutions are computed by Winograd's method; bands, patches and stacked: in this form wherever possible.
DSP_ENUM(Winograd, never, where_faster, bands, patches, stacked)

// What convolutions round their input and weights to. float16 is float on CPUs without float16 products.
DSP_ENUM(Precision, float32, bfloat16, float16)

DSP_ENUM(Pooling, max_pool, avg_pool)

// The kernels of a precision, or null: products are in float.
const WordKernels* words_of(const Kernels& kernels, Precision precision);

class Network {
  public:
    // Values are float in any precision.
    explicit Network(const std::string& isa, Precision precision = Precision::float32,
                     Winograd winograd = Winograd::where_faster);

    const Kernels& kernels;
    const WordKernels* const words; // of its precision, or null: float
    const Winograd winograd;
    std::vector<Value> values;
    std::vector<Step> steps;
    std::vector<int> inputs, outputs; // values
    bool runs = true;                 // false: a convolution without weights was added, to be planned only

    // Each returns the number of the value it adds and throws std::invalid_argument for invalid arguments.
    int add_input(int channels);
    // bias: [out_channels] or empty. A group's weights may be missing (empty).
    int add_conv(int x, int residual, int out_channels, const Window& window, Act act, std::vector<GroupIndex> groups,
                 const std::vector<float>& bias, std::optional<Requantize> requantize = {});
    // act(x * scale + shift + other); scale and shift may be empty (both or none), other may be -1.
    int add_map(int x, int other, std::vector<float> scale, std::vector<float> shift, Act act,
                std::optional<Requantize> requantize = {});
    // divisor: of an average, 0 for the size of the window.
    int add_pool(int x, Pooling kind, const Window& window, bool ceil_mode, bool include_pad, int divisor,
                 std::optional<Requantize> requantize = {});
    // act(x * other); equal sizes, or one of them a single pixel.
    int add_product(int x, int other, Act act, std::optional<Requantize> requantize = {});
    // The mean over each of size[0] x size[1] parts of the feature map.
    int add_adaptive(int x, Pair size, std::optional<Requantize> requantize = {});
    // Each pixel repeated factor x factor times, or with shuffle the pixels of factor * factor channels as one of
    // each; then padded with a value, or cut where a pad is negative.
    int add_resize(int x, int factor, bool shuffle, std::array<int, 4> pads, float value);
    // x with the size of `like`, or this size, or `factor` times its own.
    int add_fit(int x, int like, Fit fit, Pair size, int factor);
    // act((x - mean) / sqrt(variance + epsilon) * scale + shift), over the channels and pixels of each of `groups`
    // equal groups of channels of an image.
    int add_norm(int x, int groups, float epsilon, std::vector<float> scale, std::vector<float> shift, Act act);
    // Views of the planes of other values, without a copy: some channels of x, several values concatenated.
    int add_select(int x, const std::vector<int>& channels);
    int add_concat(const std::vector<int>& parts);
    // weight: [out][in], where in is channels * height * width of x. bias: [out] or empty.
    int add_linear(int x, int out_features, const std::vector<float>& weight, const std::vector<float>& bias,
                   int in_features, Act act, std::optional<Requantize> requantize = {});
    void add_output(int value);

    // The channels of the planes that a group reads, in order.
    static std::vector<Source> sources(const Step& step, const std::vector<int>& channels);

    // The weights of a conv step in tiles of these sizes, in a form. Plans with equal tiles share one copy.
    std::shared_ptr<const Packed> packed(const Step& step, const Splits& splits, Form form = Form::plain) const;

  private:
    mutable std::map<std::tuple<const Step*, Splits, Form>, std::weak_ptr<const Packed>> packed_;

    int make(Step step, int channels, bool nonnegative, std::optional<Requantize> requantize = {});
    int add_view(std::vector<int> parts, std::vector<Pair> planes);
    void check(int value) const;
};

[[noreturn]] void fail(const std::string& message);

} // namespace dsp
