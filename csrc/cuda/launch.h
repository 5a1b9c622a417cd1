// The host's interface to the kernels, without CUDA headers: op.cpp calls it, launch.cu implements it. The functions
// throw std::runtime_error if there is no such kernel or CUDA reports an error.
#pragma once

#include <string>

#include "params.h"

namespace dsp {

// Launch on `stream` (a cudaStream_t) of the current device, whose index is `device`.
void launch_conv(const ConvSizes& sizes, const Tensors& tensors, Dtype dtype, int device, void* stream);
void launch_block(const BlockSizes& sizes, const Tensors& tensors, Dtype dtype, int device, void* stream);

// Sets the device of this library's own CUDA runtime to that of torch.
void use_device(int device);

// A line for each kernel of convolutions: what Python must know to arrange its weights and tables.
std::string describe_kernels();

}  // namespace dsp
