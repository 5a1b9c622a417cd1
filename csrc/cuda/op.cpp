// dsp_kernels::cuda_conv and cuda_block, the launchers of convolutions and of residual blocks as torch ops, registered
// through LibTorch's stable ABI. Python (dsp_kernels/run/gpu/cuda/conv.py, blocks/conv.py) has checked shapes and made
// tables and geometry; checked again here is what would let a kernel access memory outside its tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "launch.h"

// Declared only inside torch's own build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// The version of CUDA and the architectures that this library was built for, such as "13.0 sm_80 compute_80 sm_90a"
// (defined by tools/build_cuda.py); Python calls this through ctypes.
extern "C" __attribute__((visibility("default"))) const char* dsp_kernels_build() { return DSP_KERNELS_BUILD; }

// All names, in their order, and numbers that Python must have too (interface() in run/gpu/cuda/launch.py):
extern "C" __attribute__((visibility("default"))) const char* dsp_kernels_interface() {
    using namespace dsp;
#define DSP_NAME(name) " " #name
#define DSP_VALUE(name) text += " " #name "=" + std::to_string(name);
    static const std::string interface = [] {
        std::string text = "Kernel:" DSP_KERNELS(DSP_NAME) "\nActivation:" DSP_ACTIVATIONS(DSP_NAME)
            "\nResidual:" DSP_RESIDUALS(DSP_NAME) "\nConvSizes:" DSP_CONV_FIELDS(DSP_NAME)
            "\nBlockSizes:" DSP_BLOCK_FIELDS(DSP_NAME) "\nBlockRegion:" DSP_REGION_FIELDS(DSP_NAME)
            "\nBlockConv:" DSP_BLOCK_CONV_FIELDS(DSP_NAME) "\nlimits:";
        DSP_LIMITS(DSP_VALUE)
        return text + "\n" + describe_kernels();
    }();
    return interface.c_str();
}

namespace dsp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool good, const char* wrong) {
    if (!good) throw std::runtime_error(wrong);
}

Dtype dtype_of(const Tensor& x) {
    const ScalarType type = x.scalar_type();
    if (type == ScalarType::Half) return Dtype::float16;
    if (type == ScalarType::BFloat16) return Dtype::bfloat16;
    check(type == ScalarType::Float, "the dtype of x is not supported");
    return Dtype::float32;
}

// The struct whose fields are these numbers.
template <class Sizes>
Sizes sizes_of(const std::vector<int64_t>& list) {
    const std::vector<int> numbers(list.begin(), list.end());
    check(numbers.size() * sizeof(int) == sizeof(Sizes), "wrong number of sizes");
    Sizes sizes;
    std::memcpy(&sizes, numbers.data(), sizeof sizes);
    return sizes;
}

// The tensors of a launch on x's device: those of the convolution's own type and the others.
struct Arguments {
    const Tensor &x, &out;
    const std::optional<Tensor>& residual;
    const Tensor &weights, &bias, &tables;

    // Whether a tensor of this type is on the device, contiguous, and aligned to 16 bytes.
    bool is_valid(const Tensor& t, ScalarType wanted) const {
        return t.scalar_type() == wanted && t.get_device_index() == x.get_device_index() && t.is_contiguous() &&
               reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    }
    bool fits(const Tensor& t, int64_t numel) const { return is_valid(t, x.scalar_type()) && t.numel() == numel; }

    // read, made: numbers of x and of out and residual; rows: filters of all tiles; table_size: the least.
    void check_all(int64_t read, int64_t made, int64_t rows, int64_t table_size) const {
        check(fits(x, read), "x does not fit, or is not aligned to 16 bytes");
        check(fits(out, made), "out does not fit, or is not aligned to 16 bytes");
        check(!residual || fits(*residual, made), "residual does not fit");
        check(is_valid(weights, x.scalar_type()) && is_valid(bias, ScalarType::Float) && bias.numel() >= rows &&
                  is_valid(tables, ScalarType::Int) && tables.numel() >= table_size,
              "weights, bias or tables do not fit");
    }

    // launch(sizes, tensors, dtype, device, stream) on torch's current stream.
    template <class Sizes>
    void run(void (*launch)(const Sizes&, const Tensors&, Dtype, int, void*), const Sizes& sizes) const {
        const int device = x.get_device_index();
        const torch::stable::accelerator::DeviceGuard guard(device);
        use_device(device);
        void* stream = nullptr;
        check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "there is no stream");
        const Tensors tensors = {x.data_ptr(),
                                 out.data_ptr(),
                                 residual ? residual->data_ptr() : nullptr,
                                 weights.data_ptr(),
                                 static_cast<const float*>(bias.data_ptr()),
                                 static_cast<const int*>(tables.data_ptr())};
        launch(sizes, tensors, dtype_of(x), device, stream);
    }
};

void cuda_conv(const Tensor& x, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& weights,
               const Tensor& bias, const Tensor& tables, const std::vector<int64_t>& size_list) {
    const auto s = sizes_of<ConvSizes>(size_list);
    const Arguments arguments{x, out, residual, weights, bias, tables};
    const int64_t batch = s.batch;
    arguments.check_all(batch * s.in_channels * s.height * s.width, batch * s.out_channels * s.out_height * s.out_width,
                        int64_t{s.tile_count} * s.filters, s.gather_at);
    arguments.run(launch_conv, s);
}

void cuda_block(const Tensor& x, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& weights,
                const Tensor& bias, const Tensor& tables, const std::vector<int64_t>& size_list) {
    const auto s = sizes_of<BlockSizes>(size_list);
    check(s.conv_count >= 1 && s.conv_count <= kMostConvs, "wrong number of convolutions");
    check(s.batch % 8 == 0, "the batch is not a multiple of 8");
    check(s.turns >= 1 && s.tile_n >= 1 && s.tile_n <= kLargestDivisor, "wrong number of turns or images");
    for (int i = 0; i <= s.conv_count; ++i) {
        const BlockRegion& r = s.regions[i];
        check(r.rows >= 1 && r.columns >= 1 && r.columns <= kLargestDivisor &&
                  int64_t{r.rows} * r.columns * s.tile_n <= kMostChunks,
              "a tile is too large for the block kernel, or empty");
        const int64_t end = r.offset + int64_t{r.slots} * r.channel_bytes;
        check(i == s.conv_count || (r.offset >= 0 && end <= s.shared_bytes), "a region is outside the shared memory");
    }
    const Arguments arguments{x, out, residual, weights, bias, tables};
    const BlockRegion &input = s.regions[0], &output = s.regions[s.conv_count];
    const BlockConv& last = s.convs[s.conv_count - 1];
    const int64_t batch = s.batch;
    arguments.check_all(batch * s.in_channels * input.height * input.width,
                        batch * s.out_channels * output.height * output.width,
                        last.first_row + int64_t{last.tile_count} * s.filters, s.table_size);
    check(out.data_ptr() != x.data_ptr(), "out is x");
    check(residual.has_value() == (s.residual_kind == static_cast<int>(Residual::tensor)), "residual does not fit");
    arguments.run(launch_block, s);
}

}  // namespace
}  // namespace dsp

STABLE_TORCH_LIBRARY_FRAGMENT(dsp_kernels, m) {
    constexpr auto arguments =
        "(Tensor x, Tensor(a!) out, Tensor? residual, Tensor weights, Tensor bias, Tensor tables, int[] sizes) -> ()";
    m.def((std::string("cuda_conv") + arguments).c_str());
    m.def((std::string("cuda_block") + arguments).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(dsp_kernels, CUDA, m) {
    m.impl("cuda_conv", TORCH_BOX(&dsp::cuda_conv));
    m.impl("cuda_block", TORCH_BOX(&dsp::cuda_block));
}
