#include "launch.cuh"
#include "runners.h"
#include "warpgroup_machine.cuh"

namespace dsp {

void run_wgmma(bool half, const Sizes& sizes, const ConvParams& params, int device, void* stream,
               const std::string& what) {
    const auto run = [&](auto kernel, const Launch& plan) {
        launch<decltype(kernel), WarpgroupMachine>(plan, device, static_cast<cudaStream_t>(stream), what);
    };
    if (half)
        dispatch_wgmma<Half>(sizes, params, shared_limit(device), run);
    else
        dispatch_wgmma<Bfloat>(sizes, params, shared_limit(device), run);
}

}  // namespace dsp
