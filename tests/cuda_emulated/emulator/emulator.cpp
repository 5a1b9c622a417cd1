// The ops on the host: the same sizes, tables and kernel templates, run by HostMachine block by block.
#include <string>
#include <vector>

#include "../../../csrc/cuda/block_plan.h"
#include "../../../csrc/cuda/launch_plan.h"
#include "host_machine.h"

namespace {

using dsp::Bfloat;
using dsp::Half;

// In the order of Arguments in tests/helpers/emulation.py.
struct Arguments {
    int64_t dtype;     // 0 float16, 1 bfloat16, 2 float32
    void* tensors[6];  // x, out, residual, weights, bias, tables; null: none
    int64_t bytes[6];  // of each
    const int64_t* sizes;
    int64_t size_count;
    int64_t late_copies, backwards;  // see Modes
    int64_t shared_limit;            // bytes that a block may have
    dsp::Counts counts;              // of the launch

    const void* x() const { return tensors[0]; }
    void* out() const { return tensors[1]; }
    const void* residual() const { return tensors[2]; }
    const void* weights() const { return tensors[3]; }
    const float* bias() const { return static_cast<const float*>(tensors[4]); }
    const int* tables() const { return static_cast<const int*>(tensors[5]); }
};

// A function (kernel, plan) that runs all blocks of a launch.
auto runner(Arguments& a) {
    std::vector<dsp::Range> ranges;
    for (int i = 0; i < 6; ++i) {
        const char* begin = static_cast<const char*>(a.tensors[i]);
        ranges.push_back({begin, begin + a.bytes[i], i == 1});
    }
    const dsp::Modes modes{a.late_copies != 0, a.backwards != 0};
    return [ranges, modes, &a](auto kernel, const auto& plan) {
        if (plan.shared_bytes > a.shared_limit) throw std::runtime_error("a block wants too much shared memory");
        for (int64_t block = 0; block < plan.blocks; ++block) {
            dsp::HostMachine machine(plan.threads, plan.shared_bytes, modes, a.counts, ranges);
            decltype(kernel)::run(machine, plan.params, static_cast<int>(block));
        }
    };
}

void run_conv(Arguments& a) {
    if (a.size_count != dsp::Sizes::kCount) throw std::runtime_error("wrong number of sizes");
    const dsp::Sizes s(a.sizes);
    const dsp::ConvParams params =
        dsp::params_of(s, a.x(), a.out(), a.residual(), a.weights(), a.bias(), a.tables());
    const auto run = runner(a);
    const bool warpgroups = dsp::needs_wgmma(s);
    if (warpgroups && a.dtype == 0)
        dsp::dispatch_wgmma<Half>(s, params, a.shared_limit, run);
    else if (warpgroups && a.dtype == 1)
        dsp::dispatch_wgmma<Bfloat>(s, params, a.shared_limit, run);
    else if (a.dtype == 0)
        dsp::dispatch_16bit<Half>(s, params, a.shared_limit, run);
    else if (a.dtype == 1)
        dsp::dispatch_16bit<Bfloat>(s, params, a.shared_limit, run);
    else
        dsp::dispatch_fp32(s, params, run);
}

void run_block(Arguments& a) {
    const dsp::BlockSizes s(std::vector<int64_t>(a.sizes, a.sizes + a.size_count));
    const dsp::BlockLaunch plan =
        dsp::block_launch(s, a.x(), a.out(), a.residual(), a.weights(), a.bias(), a.tables());
    if (a.dtype == 0)
        dsp::dispatch_block<Half>(s.filters, plan, runner(a));
    else
        dsp::dispatch_block<Bfloat>(s.filters, plan, runner(a));
}

// An error's text, or null.
template <class Run>
const char* text_of_error(Run run) {
    static std::string message;
    try {
        run();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace

extern "C" {

const char* cuda_conv(Arguments* a) {
    return text_of_error([&] { run_conv(*a); });
}

const char* cuda_block(Arguments* a) {
    return text_of_error([&] { run_block(*a); });
}
}
