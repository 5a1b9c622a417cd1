// A run of a Program's steps as the native code holds it: values, steps and packed weights. Sizes come later:
// a Plan is made per image size (plan.h).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
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
    int64_t weights; // where its [count][filters] weights begin
    int64_t bias;    // where its [filters] biases begin
    std::vector<int> channels; // output channels
};

// A channel, or two channels whose pixels stand in one word (bf16.h, fp16.h); other is -1 without a partner.
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

// What the microtiles of a convolution sum: products, or what Winograd's method makes of them (winograd.h).
enum class Form { plain, bands, patches };

enum class Kind { input, conv, map, product, pool, mean, adaptive, view, linear, output };

struct Step {
    explicit Step(Kind kind) : kind(kind) {}
    Kind kind;
    int output = -1;         // value
    std::vector<int> inputs; // values
    Act act = Act::none;
    // conv and pool
    Pair kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};
    std::vector<GroupIndex> groups;
    std::vector<int> absent;
    const WordKernels* pairs = nullptr; // what computes it two channels at a time, in 16 bit; null: one by one
    std::vector<float> weights, bias; // linear: [in][out padded]; conv: the bias of each output channel
    // pool
    bool average = false, ceil_mode = false, include_pad = true;
    int divisor = 0; // 0: the window's own
    // view: per channel, the input (by its place in `inputs`) and the channel there
    std::vector<Pair> planes;
    // map: per channel, or empty
    std::vector<float> scale, shift;
    int number = 0; // of an input or output
};

struct Value {
    int channels;
    bool nonnegative = false; // a ReLU made it, so that another ReLU changes nothing
};

// Whether convolutions are computed by Winograd's method; bands and patches: in this form wherever it is possible.
enum class Winograd { never, where_faster, bands, patches };

// What convolutions round their input and weights to. fp16: only where the CPU multiplies such numbers, else floats.
enum class Numbers { f32, bf16, fp16 };

// What computes with such numbers, or null: floats are multiplied.
const WordKernels* words_of(const Kernels& kernels, Numbers numbers);

class Network {
  public:
    // Values stay float in any case.
    explicit Network(const std::string& isa, Numbers numbers = Numbers::f32, Winograd winograd = Winograd::where_faster);

    const Kernels& kernels;
    const WordKernels* const words; // of its numbers, or null: floats
    const Winograd winograd;
    std::vector<Value> values;
    std::vector<Step> steps;
    int inputs = 0, outputs = 0;

    // Each returns the number of the value it makes and throws std::invalid_argument for what cannot be.
    int add_input(int channels);
    // bias: [out_channels] or null.
    int add_conv(int x, int residual, int out_channels, Pair kernel, Pair stride, Pair padding, Pair dilation, Act act,
                 std::vector<GroupIndex> groups, const float* bias);
    // act(x * scale + shift + other): any of scale and shift (both or none) and other (-1) may be missing.
    int add_map(int x, int other, std::vector<float> scale, std::vector<float> shift, Act act);
    int add_pool(int x, bool average, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode,
                 bool include_pad, int divisor);
    // act(x * other): of one size, or one of them a single pixel.
    int add_product(int x, int other, Act act);
    int add_mean(int x);
    // The mean over each of size[0] x size[1] parts of the map.
    int add_adaptive(int x, Pair size);
    // Values that are planes of others and cost nothing: all of x, some of its channels, several one after the other.
    int add_flatten(int x);
    int add_select(int x, const std::vector<int>& channels);
    int add_concat(const std::vector<int>& parts);
    // weight: [out][in], where in is channels * height * width of x.
    int add_linear(int x, int out_features, std::vector<float> weight, const float* bias, int in_features, Act act);
    void add_output(int value);

    // What the planes are that a group reads, in order.
    static std::vector<Source> sources(const Step& step, const std::vector<int>& channels);

    // The weights of a conv step cut into these tiles and brought into a form. Plans that cut alike share one copy.
    std::shared_ptr<const Packed> packed(const Step& step, const Splits& splits, Form form = Form::plain) const;

  private:
    mutable std::mutex mutex_;
    mutable std::map<std::tuple<const Step*, Splits, Form>, std::weak_ptr<const Packed>> packed_;

    int make(Step step, int channels, bool nonnegative);
    int add_view(std::vector<int> parts, std::vector<Pair> planes);
    void check(int value) const;
};

[[noreturn]] void fail(const std::string& message);

} // namespace dsp
