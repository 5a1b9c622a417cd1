// The door from the block op (block_op.cpp) to its kernels, one source file per number format.
#pragma once

#include <string>

#include "block_plan.h"

namespace dsp {

// Launches on `stream` (a cudaStream_t) of the current device, whose number is `device`. Throws std::runtime_error
// that begins with `what` if CUDA refuses.
void run_block_half(const BlockSizes& sizes, const BlockLaunch& plan, int device, void* stream,
                    const std::string& what);
void run_block_bfloat(const BlockSizes& sizes, const BlockLaunch& plan, int device, void* stream,
                      const std::string& what);

}  // namespace dsp
