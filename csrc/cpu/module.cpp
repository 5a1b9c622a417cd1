// The Python bindings: checked numpy arrays as arguments, work done without the interpreter's lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "run.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<float>; // other dtypes are refused below, not converted
using dsp::Act;
using dsp::fail;
using dsp::Pair;

// The enumerator with this name; names are in the order of the enumerators.
template <typename Enum>
Enum named(const char* what, std::initializer_list<const char*> names, const std::string& name) {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) fail(std::string(what) + " '" + name + "' is unknown");
    return Enum(found - names.begin());
}

Act activation(const std::string& name) {
    return named<Act>("activation", {"none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid"}, name);
}

dsp::Precision precision_of(bool bf16, bool fp16) {
    if (bf16 && fp16) fail("the precision is bfloat16 or float16, not both");
    return bf16 ? dsp::Precision::bf16 : fp16 ? dsp::Precision::fp16 : dsp::Precision::f32;
}

std::vector<float> flat(const Array& array) {
    const auto dense = py::array_t<float, py::array::c_style | py::array::forcecast>(array);
    return std::vector<float>(dense.data(), dense.data() + dense.size());
}

std::vector<float> flat_or_empty(const std::optional<Array>& array) {
    return array ? flat(*array) : std::vector<float>();
}

// Built step by step; immutable after its first run.
class Native {
  public:
    Native(const std::string& isa, bool bf16, const std::string& winograd, bool fp16)
        : network_(std::make_unique<dsp::Network>(
              isa, precision_of(bf16, fp16),
              named<dsp::Winograd>("winograd", {"never", "where faster", "bands", "patches"}, winograd))) {}

    dsp::Network& open() {
        if (!network_) fail("the network has run and cannot grow");
        return *network_;
    }

    int conv(int x, int residual, int out_channels, Pair kernel, Pair stride, Pair padding, Pair dilation,
             const std::string& act, const std::vector<std::vector<int>>& in_index,
             const std::vector<std::vector<int>>& out_index, const std::vector<Array>& weights,
             const std::optional<Array>& bias) {
        if (in_index.size() != out_index.size() || in_index.size() != weights.size())
            fail("in_index, out_index and weights differ in length");
        std::vector<dsp::GroupIndex> groups;
        for (size_t g = 0; g < in_index.size(); ++g) groups.push_back({in_index[g], out_index[g], flat(weights[g])});
        const auto bias_values = flat_or_empty(bias);
        if (bias && int(bias_values.size()) != out_channels) fail("bias needs one number per output channel");
        return open().add_conv(x, residual, out_channels, kernel, stride, padding, dilation, activation(act),
                               std::move(groups), bias ? bias_values.data() : nullptr);
    }

    // A copy of a convolution of another network, with or without a residual.
    int conv_like(const Native& other, int value, int x, int residual) {
        const dsp::Step& step = other.conv_step(value);
        const int out_channels = other.network().values[value].channels;
        return open().add_conv(x, residual, out_channels, step.kernel, step.stride, step.padding, step.dilation,
                               step.act, step.groups, step.bias.data());
    }

    // Whether the convolution that computes a value was built from weights and bias bitwise equal to these.
    bool conv_holds(int value, const std::vector<Array>& weights, const std::optional<Array>& bias) const {
        const dsp::Step& step = conv_step(value);
        const auto same = [](const Array& array, const std::vector<float>& held) {
            const auto dense = py::array_t<float, py::array::c_style | py::array::forcecast>(array);
            return size_t(dense.size()) == held.size() &&
                   (held.empty() || !std::memcmp(dense.data(), held.data(), held.size() * sizeof(float)));
        };
        if (weights.size() != step.groups.size()) return false;
        for (size_t g = 0; g < weights.size(); ++g)
            if (!same(weights[g], step.groups[g].weights)) return false;
        if (bias) return same(*bias, step.bias);
        return std::all_of(step.bias.begin(), step.bias.end(), [](float b) { return b == 0.0f; });
    }

    int map(int x, int other, const std::optional<Array>& scale, const std::optional<Array>& shift,
            const std::string& act) {
        return open().add_map(x, other, flat_or_empty(scale), flat_or_empty(shift), activation(act));
    }

    int product(int x, int other, const std::string& act) { return open().add_product(x, other, activation(act)); }

    int linear(int x, const Array& weight, const std::optional<Array>& bias, const std::string& act) {
        if (weight.ndim() != 2) fail("a linear weight has two dimensions");
        const auto bias_values = flat_or_empty(bias);
        if (bias && py::ssize_t(bias_values.size()) != weight.shape(0)) fail("bias needs one number per output");
        return open().add_linear(x, int(weight.shape(0)), flat(weight), bias ? bias_values.data() : nullptr,
                                 int(weight.shape(1)), activation(act));
    }

    std::vector<std::vector<int>> output_shapes(const std::vector<std::pair<int, int>>& sizes) {
        return sealed().output_shapes(checked_sizes(sizes));
    }

    void run(const std::vector<Array>& inputs, std::vector<Array> outputs, int threads, int interleave) {
        const Call call = checked(inputs, outputs, interleave);
        if (call.images == 0) return;
        py::gil_scoped_release release;
        session_->run(call.sizes, call.images, call.sources, call.targets, threads, interleave);
    }

    // (name, value) of each operation of a plan for one thread.
    std::vector<std::pair<std::string, int>> operations(const std::vector<std::pair<int, int>>& sizes, int interleave) {
        check_interleave(interleave);
        if (interleave == 0) fail("operations need an interleave");
        return sealed().operations(checked_sizes(sizes), interleave);
    }

    int64_t scratch_bytes() { return sealed().scratch_bytes(); }
    int plan_count() { return sealed().plan_count(); }

  private:
    struct Call {
        int64_t images;
        std::vector<dsp::Size> sizes;
        std::vector<dsp::Images> sources, targets;
    };

    static void check_interleave(int interleave) {
        if (interleave < 0 || interleave > 16 || (interleave & (interleave - 1)))
            fail("interleave is 0, 1, 2, 4, 8 or 16");
    }

    std::vector<dsp::Size> checked_sizes(const std::vector<std::pair<int, int>>& sizes) {
        if (int(sizes.size()) != sealed().network().inputs) fail("one size per input is needed");
        std::vector<dsp::Size> list;
        for (const auto& size : sizes) list.push_back({size.first, size.second});
        return list;
    }

    // Checks every shape against the network, so that nothing can be out of bounds later.
    Call checked(const std::vector<Array>& inputs, std::vector<Array>& outputs, int interleave) {
        dsp::Session& session = sealed();
        const dsp::Network& network = session.network();
        if (int(inputs.size()) != network.inputs || int(outputs.size()) != network.outputs || inputs.empty())
            fail("wrong number of inputs or outputs");
        check_interleave(interleave);
        Call call;
        call.images = inputs[0].ndim() ? inputs[0].shape(0) : 0;
        int number = 0;
        for (const auto& step : network.steps) {
            if (step.kind != dsp::Kind::input) continue;
            const Array& x = inputs[number++];
            if ((x.ndim() != 4 && x.ndim() != 2) || x.shape(0) != call.images ||
                x.shape(1) != network.values[step.output].channels)
                fail("input " + std::to_string(step.number) + " has the wrong shape");
            const int h = x.ndim() == 4 ? int(x.shape(2)) : 1, w = x.ndim() == 4 ? int(x.shape(3)) : 1;
            call.sizes.push_back({h, w});
            call.sources.push_back(images_of(x, const_cast<float*>(x.data())));
        }
        if (call.images == 0) return call;
        const auto shapes = session.output_shapes(call.sizes);
        for (size_t n = 0; n < outputs.size(); ++n) {
            Array& y = outputs[n];
            const auto& s = shapes[n];
            const bool fits4 = y.ndim() == 4 && y.shape(0) == call.images && y.shape(1) == s[0] && y.shape(2) == s[1] &&
                               y.shape(3) == s[2];
            const bool fits2 = y.ndim() == 2 && y.shape(0) == call.images && y.shape(1) == s[0] && s[1] * s[2] == 1;
            if (!fits4 && !fits2) fail("output " + std::to_string(n) + " has the wrong shape");
            call.targets.push_back(images_of(y, y.mutable_data()));
        }
        return call;
    }

    std::unique_ptr<dsp::Network> network_;
    std::unique_ptr<dsp::Session> session_;

    const dsp::Network& network() const { return session_ ? session_->network() : *network_; }
    const dsp::Step& conv_step(int value) const {
        for (const auto& step : network().steps)
            if (step.kind == dsp::Kind::conv && step.output == value) return step;
        fail("value " + std::to_string(value) + " is not the output of a convolution");
    }
    dsp::Session& sealed() { // called with the interpreter's lock
        if (!session_) session_ = std::make_unique<dsp::Session>(std::move(network_));
        return *session_;
    }
    static dsp::Images images_of(const Array& array, float* base) {
        dsp::Images images{base, {0, 0, 0, 0}};
        for (py::ssize_t d = 0; d < array.ndim(); ++d) {
            if (array.strides(d) % py::ssize_t(sizeof(float))) fail("strides are not multiples of a float");
            images.stride[d] = array.strides(d) / py::ssize_t(sizeof(float));
        }
        return images;
    }
};

// A method of the network that adds a step whose arguments need no conversion.
template <typename Result, typename... Arguments>
auto adds(Result (dsp::Network::*method)(Arguments...)) {
    return [method](Native& native, Arguments... arguments) {
        return (native.open().*method)(std::forward<Arguments>(arguments)...);
    };
}

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native CPU kernels.";
    m.def("available_isas", &dsp::available_isas, "Instruction sets of this build that this CPU supports, best first.");
    m.def(
        "own_products",
        [](const std::string& isa) {
            const dsp::Kernels& kernels = dsp::kernels_for(isa);
            std::vector<std::string> names{"float32"};
            if (kernels.bf16.own) names.push_back("bfloat16");
            if (kernels.fp16.own) names.push_back("float16");
            return names;
        },
        "The dtypes that an instruction set multiplies by instructions of its own.");
    m.attr("half_terms") = dsp::half_terms;
    py::class_<Native>(m, "Network")
        .def(py::init<const std::string&, bool, const std::string&, bool>(), py::arg("isa") = "",
             py::arg("bf16") = false, py::arg("winograd") = "where faster", py::arg("fp16") = false)
        .def("input", adds(&dsp::Network::add_input))
        .def("conv", &Native::conv)
        .def("conv_like", &Native::conv_like)
        .def("conv_holds", &Native::conv_holds)
        .def("map", &Native::map)
        .def("pool", adds(&dsp::Network::add_pool))
        .def("mean", adds(&dsp::Network::add_mean))
        .def("flatten", adds(&dsp::Network::add_flatten))
        .def("product", &Native::product)
        .def("adaptive", adds(&dsp::Network::add_adaptive))
        .def("select", adds(&dsp::Network::add_select))
        .def("concat", adds(&dsp::Network::add_concat))
        .def("linear", &Native::linear)
        .def("output", adds(&dsp::Network::add_output))
        .def("output_shapes", &Native::output_shapes)
        .def("run", &Native::run, py::arg("inputs").noconvert(), py::arg("outputs").noconvert(), py::arg("threads"),
             py::arg("interleave") = 0)
        .def("operations", &Native::operations)
        .def_property_readonly("scratch_bytes", &Native::scratch_bytes)
        .def_property_readonly("plan_count", &Native::plan_count);
}
