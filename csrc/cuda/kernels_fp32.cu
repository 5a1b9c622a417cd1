#include "launch.cuh"

namespace dsp {

void run_fp32(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what) {
    dispatch_fp32(sizes, params, [&](auto kernel, const Launch& plan) {
        launch<decltype(kernel)>(plan, device, static_cast<cudaStream_t>(stream), what);
    });
}

std::string use_device(int device) {
    const cudaError_t status = cudaSetDevice(device);
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace dsp
