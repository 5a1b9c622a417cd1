// The door from the op (op.cpp, without CUDA headers) to the kernels, one source file per number format.
#pragma once

#include <string>

#include "launch_plan.h"

namespace dsp {

// Launches on `stream` (a cudaStream_t) of the current device, whose number is `device`. Throws std::runtime_error
// that begins with `what` if CUDA refuses.
void run_half(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what);
void run_bfloat(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what);
// Half or Bfloat by wgmma; only on a device of compute capability 9.0, and only where it was compiled for sm_90a.
void run_wgmma(bool half, const Sizes& sizes, const ConvParams& params, int device, void* stream,
               const std::string& what);
void run_fp32(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what);

}  // namespace dsp
