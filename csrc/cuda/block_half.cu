#include "block_launch.cuh"
#include "block_runners.h"

namespace dsp {

void run_block_half(const BlockSizes& sizes, const BlockLaunch& plan, int device, void* stream,
                  const std::string& what) {
    dispatch_block<Half>(sizes.filters, plan, [&](auto kernel, const BlockLaunch& launch) {
        launch_block<decltype(kernel)>(launch, device, static_cast<cudaStream_t>(stream), what);
    });
}

}  // namespace dsp
