// The launcher's op on the host: the same sizes, tables and kernel templates, run by HostMachine block by block.
#include <algorithm>
#include <string>

#include "../../../csrc/common/launch_plan.h"
#include "host_machine.h"

namespace {

std::string message;

}  // namespace

extern "C" {

// dtype: 0 float16, 1 bfloat16, 2 float32. bytes: of x, out, residual, weights, bias, tables. counts: see Counts.
// shared_limit: bytes of shared memory that a block may have. Returns an error's text, or null.
const char* dsp_emulate(int dtype, const void* x, void* out, const void* residual, const void* weights,
                        const float* bias, const int* tables, const int64_t* sizes, const int64_t* bytes,
                        int late_copies, int backwards, int64_t shared_limit, int64_t* counts) {
    try {
        const dsp::Sizes s(sizes);
        const auto range = [](const void* p, int64_t size, bool writable) {
            const char* begin = static_cast<const char*>(p);
            return dsp::Range{begin, begin + size, writable};
        };
        const std::vector<dsp::Range> ranges = {range(x, bytes[0], false),       range(out, bytes[1], true),
                                                range(residual, bytes[2], false), range(weights, bytes[3], false),
                                                range(bias, bytes[4], false),    range(tables, bytes[5], false)};
        dsp::Counts made;
        const dsp::ConvParams params = dsp::params_of(s, x, out, residual, weights, bias, tables);
        const auto run = [&](auto kernel, const dsp::Launch& plan) {
            for (int64_t block = 0; block < plan.blocks; ++block) {
                dsp::HostMachine machine(plan.threads, plan.shared_bytes,
                                         {late_copies != 0, backwards != 0}, made, ranges);
                decltype(kernel)::run(machine, plan.params, static_cast<int>(block));
            }
        };
        const bool warpgroups = dsp::needs_wgmma(s);
        if (warpgroups && dtype == 0)
            dsp::dispatch_wgmma<dsp::Half>(s, params, shared_limit, run);
        else if (warpgroups && dtype == 1)
            dsp::dispatch_wgmma<dsp::Bfloat>(s, params, shared_limit, run);
        else if (dtype == 0)
            dsp::dispatch_16bit<dsp::Half>(s, params, shared_limit, run);
        else if (dtype == 1)
            dsp::dispatch_16bit<dsp::Bfloat>(s, params, shared_limit, run);
        else
            dsp::dispatch_fp32(s, params, run);
        const int64_t all[] = {made.matrices, made.matrix_conflicts, made.copies, made.copy_conflicts,
                               made.stores,   made.store_conflicts,  made.loads,  made.load_conflicts};
        std::copy(std::begin(all), std::end(all), counts);
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}
}
