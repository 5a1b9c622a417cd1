#include "launch.cuh"
#include "runners.h"

namespace dsp {

void run_bfloat(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what) {
    dispatch_16bit<Bfloat>(sizes, params, shared_limit(device), [&](auto kernel, const Launch& plan) {
        launch<decltype(kernel)>(plan, device, static_cast<cudaStream_t>(stream), what);
    });
}

}  // namespace dsp
