// The host's interface to the kernels, without CUDA headers: op.cpp calls it, kernels_*.cu implement it. Each function
// launches on `stream` (a cudaStream_t) of the current device, whose index is `device`, and throws std::runtime_error
// that begins with `what` if CUDA reports an error.
#pragma once

#include <string>

#include "block_plan.h"
#include "launch_plan.h"

namespace dsp {

// T: Half or Bfloat.
template <class T>
void run_16bit(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what);
// By wgmma; only on a device of compute capability 9.0, and only if the library was compiled for sm_90a.
template <class T>
void run_wgmma(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what);
void run_fp32(const Sizes& sizes, const ConvParams& params, int device, void* stream, const std::string& what);
template <class T>
void run_block(const BlockSizes& sizes, const BlockLaunch& plan, int device, void* stream, const std::string& what);

// Sets the device of this library's own CUDA runtime to that of torch. Empty, or why it cannot.
std::string use_device(int device);

}  // namespace dsp
