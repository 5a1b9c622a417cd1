// The Python bindings: checked numpy arrays as arguments, work done without the interpreter's lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>

#include "run.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace py = pybind11;

namespace {

using Array = py::array_t<float>; // other dtypes are refused below, not converted
using dsp::Act;
using dsp::fail;
using dsp::Pair;
using Sizes = std::vector<std::pair<int, int>>; // height and width of each input

// The names of an enum that DSP_ENUM made, in the order of its enumerators.
std::vector<std::string> split(const std::string& names) {
    std::vector<std::string> list;
    for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 2) {
        end = names.find(", ", begin);
        list.push_back(names.substr(begin, end - begin));
    }
    return list;
}

template <typename Enum>
Enum named(const char* what, const char* names, const std::string& name) {
    const auto known = split(names);
    const auto found = std::find(known.begin(), known.end(), name);
    if (found == known.end()) fail(std::string(what) + " '" + name + "' is unknown; known are " + names);
    return Enum(found - known.begin());
}

Act activation(const std::string& name) { return named<Act>("activation", dsp::Act_names, name); }

std::vector<float> flat(const Array& array) {
    const auto dense = py::array_t<float, py::array::c_style | py::array::forcecast>(array);
    return std::vector<float>(dense.data(), dense.data() + dense.size());
}

std::vector<float> flat_or_empty(const std::optional<Array>& array) {
    return array ? flat(*array) : std::vector<float>();
}

// Python's Requantize: multiplier, residual, low, high, exact, signed.
using Ends = std::optional<std::tuple<Array, std::optional<float>, float, float, bool, bool>>;

std::optional<dsp::Requantize> requantize_of(const Ends& ends) {
    if (!ends) return std::nullopt;
    const auto& [multiplier, residual, low, high, exact, is_signed] = *ends;
    const dsp::Ending ending{residual.value_or(1.0f), low, high, std::isfinite(high)};
    return dsp::Requantize{ending, flat(multiplier), exact, is_signed};
}

// Microseconds of each operation of each share, medians of some calls.
std::vector<std::vector<double>> time_operations(const dsp::Route& route, const std::vector<dsp::Images>& inputs,
                                                 const std::vector<dsp::Images>& outputs, int repeats) {
    using Clock = std::chrono::steady_clock;
    py::gil_scoped_release release;
    dsp::Route timed = route;
    struct Slot {
        std::atomic<int64_t> begin, spent;
    };
    std::vector<std::deque<Slot>> slots(timed.shares.size());
    std::vector<std::vector<std::vector<double>>> samples;
    for (size_t n = 0; n < timed.shares.size(); ++n) {
        dsp::Share& share = timed.shares[n];
        auto plan = std::make_shared<dsp::Plan>(*share.plan);
        samples.emplace_back(plan->ops.size());
        for (dsp::Op& op : plan->ops) {
            Slot& slot = slots[n].emplace_back();
            op.body = [body = op.body, &slot](int first, int last, const dsp::Context& context) {
                const int64_t begin = Clock::now().time_since_epoch().count();
                int64_t unset = 0;
                slot.begin.compare_exchange_strong(unset, begin);
                body(first, last, context);
                slot.spent += Clock::now().time_since_epoch().count() - begin;
            };
        }
        share.plan = std::move(plan);
    }
    for (int repeat = 0; repeat < repeats; ++repeat) {
        for (auto& share : slots)
            for (Slot& slot : share) slot.begin = slot.spent = 0;
        dsp::run(timed, inputs, outputs);
        const int64_t end = Clock::now().time_since_epoch().count();
        for (size_t n = 0; n < slots.size(); ++n)
            for (size_t i = 0; i < slots[n].size(); ++i) {
                const bool together = timed.shares[n].plan->key.threads > 1;
                const int64_t next = i + 1 < slots[n].size()  ? slots[n][i + 1].begin.load()
                                     : n + 1 < slots.size() ? slots[n + 1].front().begin.load()
                                                            : end;
                samples[n][i].push_back(double(together ? next - slots[n][i].begin : slots[n][i].spent.load()));
            }
    }
    std::vector<std::vector<double>> medians(samples.size());
    for (size_t n = 0; n < samples.size(); ++n)
        for (auto& one : samples[n]) {
            std::nth_element(one.begin(), one.begin() + one.size() / 2, one.end());
            medians[n].push_back(one[one.size() / 2] * 1e6 * Clock::period::num / Clock::period::den);
        }
    return medians;
}

// Built step by step; immutable after its first run.
class Native {
  public:
    Native(const std::string& isa, const std::string& precision, const std::string& winograd)
        : session_(isa, named<dsp::Precision>("precision", dsp::Precision_names, precision),
                   named<dsp::Winograd>("winograd", dsp::Winograd_names, winograd)) {}

    dsp::Network& open() {
        if (sealed_) fail("the network has run and cannot grow");
        return session_.network();
    }

    int conv(int x, int residual, int out_channels, Pair kernel, Pair stride, Pair padding, Pair dilation,
             const std::string& act, const std::vector<std::vector<int>>& in_index,
             const std::vector<std::vector<int>>& out_index, const std::optional<std::vector<Array>>& weights,
             const std::optional<Array>& bias, const Ends& requantize) {
        if (in_index.size() != out_index.size() || (weights && in_index.size() != weights->size()))
            fail("in_index, out_index and weights differ in length");
        std::vector<dsp::GroupIndex> groups;
        for (size_t g = 0; g < in_index.size(); ++g)
            groups.push_back({in_index[g], out_index[g], weights ? flat((*weights)[g]) : std::vector<float>()});
        return open().add_conv(x, residual, out_channels, {kernel, stride, padding, dilation}, activation(act),
                               std::move(groups), flat_or_empty(bias), requantize_of(requantize));
    }

    // A copy of a convolution of another network, with or without a residual.
    int conv_like(const Native& other, int value, int x, int residual) {
        const dsp::Step& step = other.conv_step(value);
        return open().add_conv(x, residual, int(step.bias.size()), step, step.act, step.groups, step.bias,
                               step.requantize);
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
            const std::string& act, const Ends& requantize) {
        return open().add_map(x, other, flat_or_empty(scale), flat_or_empty(shift), activation(act),
                              requantize_of(requantize));
    }

    int pool(int x, const std::string& kind, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode,
             bool include_pad, std::optional<int> divisor, const Ends& requantize) {
        return open().add_pool(x, named<dsp::Pooling>("pool", dsp::Pooling_names, kind),
                               {kernel, stride, padding, dilation}, ceil_mode, include_pad, divisor.value_or(0),
                               requantize_of(requantize));
    }

    int fit(int x, int like, const std::string& kind, Pair size, int factor) {
        return open().add_fit(x, like, named<dsp::Fit>("fit", dsp::Fit_names, kind), size, factor);
    }

    int norm(int x, int groups, float epsilon, const Array& scale, const Array& shift, const std::string& act) {
        return open().add_norm(x, groups, epsilon, flat(scale), flat(shift), activation(act));
    }

    int product(int x, int other, const std::string& act, const Ends& requantize) {
        return open().add_product(x, other, activation(act), requantize_of(requantize));
    }

    int adaptive(int x, Pair size, const Ends& requantize) {
        return open().add_adaptive(x, size, requantize_of(requantize));
    }

    int linear(int x, const Array& weight, const std::optional<Array>& bias, const std::string& act,
               const Ends& requantize) {
        if (weight.ndim() != 2) fail("a linear weight has two dimensions");
        return open().add_linear(x, int(weight.shape(0)), flat(weight), flat_or_empty(bias), int(weight.shape(1)),
                                 activation(act), requantize_of(requantize));
    }

    std::vector<std::vector<int>> output_shapes(const Sizes& sizes) {
        return session_.summary(checked_sizes(sizes), session_.routes()).outputs;
    }

    void run(const std::vector<Array>& inputs, std::vector<Array> outputs, int threads, int interleave) {
        const Call call = checked_call(inputs, outputs, threads, interleave);
        if (!call.route) return;
        py::gil_scoped_release release;
        dsp::run(*call.route, call.sources, call.targets);
    }

    // Microseconds of every operation of launches(), medians of `repeats` calls; outputs are computed as by run().
    // Shared by all threads: from its begin to the next one's. Otherwise the time of all blocks on one thread.
    std::vector<std::vector<double>> times(const std::vector<Array>& inputs, std::vector<Array> outputs, int threads,
                                           int interleave, int repeats) {
        if (repeats < 1) fail("repeats is at least 1");
        Call call = checked_call(inputs, outputs, threads, interleave);
        return call.route ? time_operations(*call.route, call.sources, call.targets, repeats)
                          : std::vector<std::vector<double>>();
    }

  private:
    struct Call {
        dsp::RoutePtr route; // null: no images
        std::vector<dsp::Images> sources, targets;
    };

    Call checked_call(const std::vector<Array>& inputs, std::vector<Array>& outputs, int threads, int interleave) {
        const dsp::Network& network = session_.network();
        if (inputs.size() != network.inputs.size() || outputs.size() != network.outputs.size() || inputs.empty())
            fail("wrong number of inputs or outputs");
        const int64_t images = inputs[0].ndim() ? inputs[0].shape(0) : 0;
        std::vector<dsp::Size> sizes;
        Call call;
        if (!network.runs) fail("a convolution has no weights");
        for (size_t n = 0; n < inputs.size(); ++n) {
            const auto shape = shape_of(inputs[n]);
            if (shape[0] != images || shape[1] != network.values[network.inputs[n]].channels)
                fail("input " + std::to_string(n) + " has the wrong shape");
            sizes.push_back({int(shape[2]), int(shape[3])});
            call.sources.push_back(images_of(inputs[n], const_cast<float*>(inputs[n].data())));
        }
        if (images == 0) return call;
        call.route = route_of({std::move(sizes), images, threads, interleave});
        for (size_t n = 0; n < outputs.size(); ++n) {
            const auto& s = call.route->summary.outputs[n];
            if (shape_of(outputs[n]) != std::array<py::ssize_t, 4>{images, s[0], s[1], s[2]})
                fail("output " + std::to_string(n) + " has the wrong shape");
            call.targets.push_back(images_of(outputs[n], outputs[n].mutable_data()));
        }
        return call;
    }

  public:
    // What a call launches: for each range of images a dict, with (value or -1, kernel) of its operations.
    std::vector<py::dict> launches(const Sizes& sizes, int64_t images, int threads, int interleave) {
        std::vector<py::dict> list;
        for (const auto& share : route_of({checked_sizes(sizes), images, threads, interleave})->shares) {
            std::vector<std::pair<int, std::string>> operations;
            std::vector<std::vector<double>> work;
            for (const auto& op : share.plan->ops) {
                operations.emplace_back(op.made, op.name + op.detail);
                const auto counts = op.busiest(share.together ? threads : 1).counts;
                work.emplace_back(counts.begin(), counts.end());
            }
            list.push_back(py::dict(py::arg("images") = share.count, py::arg("interleave") = share.interleave,
                                    py::arg("together") = share.together, py::arg("operations") = operations,
                                    py::arg("work") = work,
                                    py::arg("bytes") = share.plan->arena_floats * int64_t(sizeof(float))));
        }
        return list;
    }

    int route_count() const { return int(session_.routes().size()); }

  private:
    std::vector<dsp::Size> checked_sizes(const Sizes& sizes) {
        sealed_ = true;
        if (sizes.size() != session_.network().inputs.size()) fail("one size per input is needed");
        std::vector<dsp::Size> list;
        for (const auto& size : sizes) list.push_back({size.first, size.second});
        return list;
    }

    // Plans are built without the interpreter's lock, so that other calls can run.
    dsp::RoutePtr route_of(dsp::CallKey key) {
        if (key.interleave < 0 || key.interleave > 16 || (key.interleave & (key.interleave - 1)))
            fail("interleave is 0, 1, 2, 4, 8 or 16");
        key.threads = std::max(key.threads, 1);
        sealed_ = true;
        if (auto found = session_.find(key)) return found;
        const dsp::Routes known = session_.routes();
        dsp::RoutePtr made;
        {
            py::gil_scoped_release release;
            made = session_.make(key, known);
#ifdef __GLIBC__
            // What a plan allocates between large tensors keeps the heap from shrinking when they are freed: ResNet-20
            // swapped kept 3.1 GB after 400 sizes of images of 192 to 345 pixels, and 0.1 GB with this.
            if (int64_t(key.sizes[0].h) * key.sizes[0].w > 1 << 14) malloc_trim(0);
#endif
        }
        return session_.keep(std::move(made));
    }

    dsp::Session session_;
    bool sealed_ = false; // its plans refer to the steps

    const dsp::Step& conv_step(int value) const {
        for (const auto& step : session_.network().steps)
            if (step.kind == dsp::Kind::conv && step.output == value) return step;
        fail("value " + std::to_string(value) + " is not the output of a convolution");
    }
    // (batch, channels, height, width); (batch, features) are images of one pixel. Zeros for any other array.
    static std::array<py::ssize_t, 4> shape_of(const Array& array) {
        std::array<py::ssize_t, 4> shape{0, 0, 1, 1};
        if (array.ndim() == 2 || array.ndim() == 4) std::copy_n(array.shape(), array.ndim(), shape.begin());
        return shape;
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
            if (kernels.quads[0].own) names.push_back("int8");
            return names;
        },
        "The dtypes that an instruction set multiplies by instructions of its own.");
    m.attr("half_terms") = dsp::half_terms;
    m.attr("counts") = split(dsp::Count_names); // of launches()["work"]
    m.attr("activations") = split(dsp::Act_names);
    py::class_<Native>(m, "Network")
        .def(py::init<const std::string&, const std::string&, const std::string&>(), py::arg("isa") = "",
             py::arg("precision") = "float32", py::arg("winograd") = "where_faster")
        .def("input", adds(&dsp::Network::add_input))
        .def("conv", &Native::conv, py::arg("x"), py::arg("residual"), py::arg("out_channels"), py::arg("kernel_size"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("activation"), py::arg("in_index"),
             py::arg("out_index"), py::arg("weights"), py::arg("bias"),
             py::arg("requantize") = py::none())
        .def("conv_like", &Native::conv_like)
        .def("conv_holds", &Native::conv_holds)
        .def("map", &Native::map, py::arg("x"), py::arg("other"), py::arg("scale"), py::arg("shift"),
             py::arg("activation"), py::arg("requantize") = py::none())
        .def("pool", &Native::pool, py::arg("x"), py::kw_only(), py::arg("kind"), py::arg("kernel_size"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation") = Pair{1, 1}, py::arg("ceil_mode"),
             py::arg("count_include_pad") = true, py::arg("divisor_override") = py::none(),
             py::arg("requantize") = py::none())
        .def("product", &Native::product, py::arg("x"), py::arg("other"), py::arg("activation"),
             py::arg("requantize") = py::none())
        .def("fit", &Native::fit)
        .def("norm", &Native::norm)
        .def("adaptive", &Native::adaptive, py::arg("x"), py::arg("size"), py::arg("requantize") = py::none())
        .def("resize", adds(&dsp::Network::add_resize))
        .def("select", adds(&dsp::Network::add_select))
        .def("concat", adds(&dsp::Network::add_concat))
        .def("linear", &Native::linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("activation"),
             py::arg("requantize") = py::none())
        .def("output", adds(&dsp::Network::add_output))
        .def("output_shapes", &Native::output_shapes)
        .def("run", &Native::run, py::arg("inputs").noconvert(), py::arg("outputs").noconvert(), py::arg("threads"),
             py::arg("interleave") = 0)
        .def("times", &Native::times, py::arg("inputs").noconvert(), py::arg("outputs").noconvert(), py::arg("threads"),
             py::arg("interleave"), py::arg("repeats"))
        .def("launches", &Native::launches, py::arg("sizes"), py::arg("images"), py::arg("threads"),
             py::arg("interleave") = 0)
        .def_property_readonly("route_count", &Native::route_count);
}
