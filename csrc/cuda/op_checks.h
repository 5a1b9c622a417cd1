// What the ops (op.cpp, block_op.cpp) check of their tensors and get from torch, through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"

// Its declaration stands behind a macro of torch's own build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace dsp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool good, const std::string& what, const char* wrong) {
    if (!good) throw std::runtime_error(what + ": " + wrong);
}

// Whether a tensor of this type lies on the device, contiguous from a multiple of 16 bytes on.
inline bool lies(const Tensor& t, ScalarType type, int device) {
    return t.scalar_type() == type && t.get_device_index() == device && t.is_contiguous() &&
           reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// torch's stream on the device that a DeviceGuard made the current one.
inline void* current_stream(int device, const std::string& what) {
    const std::string refused = use_device(device);
    if (!refused.empty()) throw std::runtime_error(what + ": " + refused);
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, what, "there is no stream");
    return stream;
}

inline const void* pointer_or_null(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

}  // namespace dsp
