// The block launcher's op on the host, run by HostMachine block by block.
#include <algorithm>
#include <string>

#include "../../../csrc/common/block_plan.h"
#include "host_machine.h"

namespace {

std::string message;

}  // namespace

extern "C" {

// dtype: 0 float16, 1 bfloat16. bytes: of x, out, residual, weights, bias, tables. counts: see Counts; all accesses of
// shared memory are watched for races. Returns an error's text, or null.
const char* dsp_emulate_block(int dtype, const void* x, void* out, const void* residual, const void* weights,
                              const float* bias, const int* tables, const int64_t* sizes, int64_t size_count,
                              const int64_t* bytes, int late_copies, int backwards, int64_t* counts) {
    try {
        const dsp::BlockSizes s(std::vector<int64_t>(sizes, sizes + size_count));
        const auto range = [](const void* p, int64_t size, bool writable) {
            const char* begin = static_cast<const char*>(p);
            return dsp::Range{begin, begin + size, writable};
        };
        const std::vector<dsp::Range> ranges = {range(x, bytes[0], false),        range(out, bytes[1], true),
                                                range(residual, bytes[2], false), range(weights, bytes[3], false),
                                                range(bias, bytes[4], false),     range(tables, bytes[5], false)};
        dsp::Counts made;
        const dsp::BlockLaunch plan = dsp::block_launch(s, x, out, residual, weights, bias, tables);
        const auto run = [&](auto kernel, const dsp::BlockLaunch& launch) {
            for (int64_t block = 0; block < launch.blocks; ++block) {
                dsp::HostMachine machine(launch.threads, launch.shared_bytes,
                                         {late_copies != 0, backwards != 0, true}, made, ranges);
                decltype(kernel)::run(machine, launch.params, static_cast<int>(block));
            }
        };
        if (dtype == 0)
            dsp::dispatch_block<dsp::Half>(s.filters, plan, run);
        else
            dsp::dispatch_block<dsp::Bfloat>(s.filters, plan, run);
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
