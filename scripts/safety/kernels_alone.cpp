// The native network against plain loops, without Python, for emulated machines (scripts/safety/check_arm64.sh). Prints
// one line per instruction set; returns 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "run.h"

namespace {

using dsp::Act;
using dsp::Pair;

std::mt19937 generator(1);

float number() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator); }
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::vector<float> numbers(int64_t count) {
    std::vector<float> list(count);
    for (float& x : list) x = number();
    return list;
}

double activate(double x, Act act) {
    switch (act) {
    case Act::relu: return x > 0 ? x : 0;
    case Act::relu6: return x < 0 ? 0 : x > 6 ? 6 : x;
    case Act::silu: return x / (1 + std::exp(-x));
    case Act::hardswish: return x * std::fmin(std::fmax(x + 3, 0), 6) / 6;
    case Act::sigmoid: return 1 / (1 + std::exp(-x));
    case Act::hardsigmoid: return std::fmin(std::fmax(x + 3, 0), 6) / 6;
    default: return x;
    }
}

struct Case {
    int channels, filters, h, w, images, interleave, threads;
    Pair kernel, stride, padding, dilation;
    bool residual;
    Act act;
    dsp::Winograd winograd;
};

Case any_case() {
    Case c{};
    c.channels = between(1, 20), c.filters = between(1, 20);
    c.kernel = {between(1, 3), between(1, 3)}, c.stride = {between(1, 3), between(1, 3)};
    c.dilation = {between(1, 2), between(1, 2)}, c.padding = {between(0, 2), between(0, 2)};
    c.h = between(5, 20), c.w = between(5, 20);
    c.images = between(1, 9), c.interleave = 1 << between(0, 4), c.threads = between(1, 2);
    c.residual = between(0, 1);
    c.act = Act(between(0, 4));
    c.winograd = std::array{dsp::Winograd::never, dsp::Winograd::bands, dsp::Winograd::patches}[between(0, 2)];
    return c;
}

// y = sigmoid(gate) * conv: a gathered convolution with residual, a concatenation, a gate and a product.
bool agrees(const Case& c, const std::string& isa) {
    const int oh = dsp::output_size(c.h, c.kernel[0], c.stride[0], c.padding[0], c.dilation[0]);
    const int ow = dsp::output_size(c.w, c.kernel[1], c.stride[1], c.padding[1], c.dilation[1]);
    const int taps = c.kernel[0] * c.kernel[1];
    // Two groups that share inputs; an output may be in neither.
    std::vector<dsp::GroupIndex> groups(2);
    for (int i = 0; i < c.channels; ++i)
        for (auto& group : groups)
            if (between(0, 2)) group.in.push_back(i);
    for (int o = 0; o < c.filters; ++o)
        if (const int g = between(0, 4)) groups[g % 2].out.push_back(o);
    for (auto& group : groups) group.weights = numbers(int64_t(group.in.size()) * group.out.size() * taps);
    const auto bias = numbers(c.filters);

    dsp::Session session(isa, dsp::Precision::float32, c.winograd);
    dsp::Network* const network = &session.network();
    const int x = network->add_input(c.channels);
    const int add = c.residual ? network->add_input(c.filters) : -1;
    const int y =
        network->add_conv(x, add, c.filters, {c.kernel, c.stride, c.padding, c.dilation}, c.act, groups, bias);
    const int gate = network->add_map(network->add_adaptive(y, {1, 1}), -1, {}, {}, Act::sigmoid);
    network->add_output(network->add_concat({network->add_product(y, gate, Act::none), y}));

    std::vector<float> in = numbers(int64_t(c.images) * c.channels * c.h * c.w);
    std::vector<float> residual = numbers(int64_t(c.images) * c.filters * oh * ow);
    const int64_t map = int64_t(oh) * ow;
    std::vector<float> out(2 * residual.size(), NAN);
    const auto planar = [](std::vector<float>& data, int channels, int h, int w) {
        return dsp::Images{data.data(), {int64_t(channels) * h * w, int64_t(h) * w, w, 1}};
    };
    std::vector<dsp::Size> sizes{{c.h, c.w}};
    std::vector<dsp::Images> inputs{planar(in, c.channels, c.h, c.w)}, outputs{planar(out, 2 * c.filters, oh, ow)};
    if (c.residual) sizes.push_back({oh, ow}), inputs.push_back(planar(residual, c.filters, oh, ow));
    dsp::run(*session.make({sizes, c.images, c.threads, c.interleave}, {}), inputs, outputs);

    for (int n = 0; n < c.images; ++n)
        for (int o = 0; o < c.filters; ++o) {
            const dsp::GroupIndex* group = nullptr;
            size_t row = 0;
            for (const auto& g : groups)
                for (size_t k = 0; k < g.out.size(); ++k)
                    if (g.out[k] == o) group = &g, row = k;
            std::vector<double> expected(map);
            double mean = 0.0;
            for (int64_t p = 0; p < map; ++p) {
                double sum = group ? bias[o] : 0.0;
                for (size_t i = 0; group && i < group->in.size(); ++i)
                    for (int t = 0; t < taps; ++t) {
                        const int row_in = int(p / ow) * c.stride[0] - c.padding[0] + t / c.kernel[1] * c.dilation[0];
                        const int column = int(p % ow) * c.stride[1] - c.padding[1] + t % c.kernel[1] * c.dilation[1];
                        if (row_in < 0 || row_in >= c.h || column < 0 || column >= c.w) continue;
                        sum += double(group->weights[(row * group->in.size() + i) * taps + t]) *
                               in[((int64_t(n) * c.channels + group->in[i]) * c.h + row_in) * c.w + column];
                    }
                if (c.residual) sum += residual[(int64_t(n) * c.filters + o) * map + p];
                expected[p] = activate(sum, c.act);
                mean += expected[p] / double(map);
            }
            for (int64_t p = 0; p < map; ++p) {
                const float* image = out.data() + int64_t(n) * 2 * c.filters * map;
                const double gated = expected[p] * activate(mean, Act::sigmoid);
                // 180 terms below 1 each: about 180 roundings of 2^-24 in a sum of at most 180.
                if (!(std::fabs(image[(c.filters + o) * map + p] - expected[p]) <= 1e-4) ||
                    !(std::fabs(image[o * map + p] - gated) <= 1e-4))
                    return false;
            }
        }
    return true;
}

} // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 200;
    for (const auto& isa : dsp::available_isas()) {
        generator.seed(1);
        for (int n = 0, run = 0; n < cases; ++run) {
            const Case c = any_case();
            if (dsp::output_size(c.h, c.kernel[0], c.stride[0], c.padding[0], c.dilation[0]) < 1 ||
                dsp::output_size(c.w, c.kernel[1], c.stride[1], c.padding[1], c.dilation[1]) < 1)
                continue;
            ++n;
            if (!agrees(c, isa)) {
                std::printf("%s: case %d differs\n", isa.c_str(), run);
                return 1;
            }
        }
        std::printf("%s: %d cases agree\n", isa.c_str(), cases);
    }
    return 0;
}
