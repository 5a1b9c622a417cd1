// A segment of a Program in native form: values (tensors), steps and weights, without image sizes; a Plan is made per
// image size (plan.h).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
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

// Consecutive filters of one group that one microtile computes.
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

// A channel, or two channels packed into words (bf16.h, fp16.h); other is -1 without a partner.
struct Source {
    int channel, other;
};

struct GroupIndex {
    std::vector<int> in, out;
    std::vector<float> weights; // [filters][channels][kh][kw]
};

// The weights of a convolution in the order in which its microtiles read them.
struct Packed {
    std::vector<FilterTile> tiles;
    std::vector<float> weights, bias;
};
using Splits = std::vector<std::vector<int>>; // sizes of the filter tiles of each group

// How a convolution is summed: directly, or in one of two forms of Winograd's method (winograd.h).
enum class Form { plain, bands, patches };

enum class Kind { input, conv, map, product, pool, adaptive, resize, view, linear, output };

struct Step : Window { // of a conv or pool
    explicit Step(Kind kind, std::vector<int> inputs = {}, Act act = Act::none)
        : kind(kind), inputs(std::move(inputs)), act(act) {}
    Kind kind;
    std::vector<int> inputs; // values
    int output = -1;         // value
    Act act;
    // conv
    std::vector<GroupIndex> groups;
    std::vector<int> absent;
    const WordKernels* pairs = nullptr; // computes it in 16 bit, two channels at a time; null: in float
    std::vector<float> weights, bias;   // linear: [in][out padded]; conv: the bias of each output channel
    // pool
    bool average = false, ceil_mode = false, include_pad = true;
    int divisor = 0; // 0: the size of the window
    // resize; pads: top, bottom, left, right
    int factor = 1;
    bool shuffle = false;
    std::array<int, 4> pads{};
    float value = 0.0f;
    // view: per channel, the input (an index into `inputs`) and its channel
    std::vector<Pair> planes;
    // map: per channel, or empty
    std::vector<float> scale, shift;
    int number = 0; // of an input or output; of a linear layer its input features
};

struct Value {
    int channels;
    bool nonnegative = false; // a ReLU computed it, so another ReLU is a no-op
};

// Whether convolutions are computed by Winograd's method; bands and patches: in this form wherever possible.
DSP_ENUM(Winograd, never, where_faster, bands, patches)

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
                 const std::vector<float>& bias);
    // act(x * scale + shift + other); scale and shift may be empty (both or none), other may be -1.
    int add_map(int x, int other, std::vector<float> scale, std::vector<float> shift, Act act);
    // divisor: of an average, 0 for the size of the window.
    int add_pool(int x, Pooling kind, const Window& window, bool ceil_mode, bool include_pad, int divisor);
    // act(x * other); equal sizes, or one of them a single pixel.
    int add_product(int x, int other, Act act);
    // The mean over each of size[0] x size[1] parts of the feature map.
    int add_adaptive(int x, Pair size);
    // Each pixel repeated factor x factor times, or with shuffle the pixels of factor * factor channels as one of
    // each; then padded with a value, or cut where a pad is negative.
    int add_resize(int x, int factor, bool shuffle, std::array<int, 4> pads, float value);
    // Views of the planes of other values, without a copy: some channels of x, several values concatenated.
    int add_select(int x, const std::vector<int>& channels);
    int add_concat(const std::vector<int>& parts);
    // weight: [out][in], where in is channels * height * width of x. bias: [out] or empty.
    int add_linear(int x, int out_features, const std::vector<float>& weight, const std::vector<float>& bias,
                   int in_features, Act act);
    void add_output(int value);

    // The planes that a group reads, in order.
    static std::vector<Source> sources(const Step& step, const std::vector<int>& channels);

    // The weights of a conv step in tiles of these sizes, in a form. Plans with equal tiles share one copy.
    std::shared_ptr<const Packed> packed(const Step& step, const Splits& splits, Form form = Form::plain) const;

  private:
    mutable std::map<std::tuple<const Step*, Splits, Form>, std::weak_ptr<const Packed>> packed_;

    int make(Step step, int channels, bool nonnegative);
    int add_view(std::vector<int> parts, std::vector<Pair> planes);
    void check(int value) const;
};

[[noreturn]] void fail(const std::string& message);

} // namespace dsp
