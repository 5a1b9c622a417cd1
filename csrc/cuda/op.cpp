// dsp_kernels::cuda_conv and cuda_block, the launchers of convolutions and of residual blocks as torch ops, registered
// through LibTorch's stable ABI. Python (dsp_kernels/run/gpu/cuda/conv.py, blocks/conv.py) has checked shapes and made
// tables and geometry; checked again here is what would let a kernel access memory outside its tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "launch.h"

// Declared only inside torch's own build.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// The version of CUDA and the architectures that this library was built for, such as "13.0 sm_80 compute_80 sm_90a"
// (defined by tools/build_cuda.py); Python calls this through ctypes.
extern "C" __attribute__((visibility("default"))) const char* dsp_kernels_build() { return DSP_KERNELS_BUILD; }

namespace dsp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool good, const std::string& what, const char* wrong) {
    if (!good) throw std::runtime_error(what + ": " + wrong);
}

// The tensors of a launch on a device: those of the convolution's own type and the others.
struct Arguments {
    const Tensor &x, &out;
    const std::optional<Tensor>& residual;
    const Tensor &weights, &bias, &tables;
    const ScalarType type = x.scalar_type();
    const int device = x.get_device_index();

    // Whether a tensor of this type is on the device, contiguous, and aligned to 16 bytes.
    bool is_valid(const Tensor& t, ScalarType wanted) const {
        return t.scalar_type() == wanted && t.get_device_index() == device && t.is_contiguous() &&
               reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    }
    bool fits(const Tensor& t, int64_t numel) const { return is_valid(t, type) && t.numel() == numel; }
    void check_parameters(bool large_enough, const std::string& what) const {
        check(is_valid(weights, type) && is_valid(bias, ScalarType::Float) && is_valid(tables, ScalarType::Int) &&
                  large_enough,
              what, "weights, bias or tables do not fit");
    }

    // make(x, out, residual, weights, bias, tables) with the data pointers.
    template <class Make>
    auto with_pointers(Make make) const {
        return make(x.data_ptr(), out.data_ptr(), residual ? residual->data_ptr() : nullptr, weights.data_ptr(),
                    static_cast<const float*>(bias.data_ptr()), static_cast<const int*>(tables.data_ptr()));
    }

    // run(Half or Bfloat).
    template <class Run>
    void with_16bit(const std::string& what, Run run) const {
        if (type == ScalarType::Half) return run(Half{});
        check(type == ScalarType::BFloat16, what, "the dtype of x is not supported");
        run(Bfloat{});
    }
};

// torch's stream on the device that a DeviceGuard made current.
void* current_stream(int device, const std::string& what) {
    const std::string error = use_device(device);
    if (!error.empty()) throw std::runtime_error(what + ": " + error);
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, what, "there is no stream");
    return stream;
}

std::string by(int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); }

std::string describe(const Sizes& s) {
    static const char* const kNames[] = {"chwn",      "halo",  "nhwc",       "fp32_chwn",
                                         "fp32_nhwc", "wgmma", "wgmma_halo", "nhwc_sliced"};
    const std::string name = s.kernel >= 0 && s.kernel < 8 ? kNames[s.kernel] : std::to_string(s.kernel);
    return "CUDA kernel " + name + " of " + std::to_string(s.filters) + " filters, batch " + std::to_string(s.batch) +
           ", " + std::to_string(s.in_channels) + " channels of " + by(s.height, s.width) + " to " +
           std::to_string(s.out_channels) + " of " + by(s.out_height, s.out_width) + ", " +
           std::to_string(s.tile_count) + " tiles";
}

std::string describe(const BlockSizes& s) {
    const size_t last = s.last();
    return "CUDA block kernel of " + std::to_string(s.conv_count) + " convolutions and " + std::to_string(s.filters) +
           " filters, batch " + std::to_string(s.batch) + ", " + std::to_string(s.in_channels) + " channels of " +
           by(s.height(0), s.width(0)) + " to " + std::to_string(s.out_channels) + " of " +
           by(s.height(last), s.width(last)) + ", tiles of " + by(s.region(last, 2), s.region(last, 3)) + "x" +
           std::to_string(8 * s.tile_n) + " with " + std::to_string(s.shared_bytes) + " bytes";
}

void cuda_conv(const Tensor& x, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& weights,
               const Tensor& bias, const Tensor& tables, const std::vector<int64_t>& size_list) {
    check(size_list.size() == Sizes::kCount, "dsp_kernels::cuda_conv", "wrong number of sizes");
    const Sizes sizes(size_list.data());
    const std::string what = describe(sizes);
    const Arguments a{x, out, residual, weights, bias, tables};
    const int64_t made = sizes.batch * sizes.out_channels * sizes.out_height * sizes.out_width;
    check(a.fits(x, sizes.batch * sizes.in_channels * sizes.height * sizes.width), what,
          "x does not fit, or is not aligned to 16 bytes");
    check(a.fits(out, made), what, "out does not fit, or is not aligned to 16 bytes");
    check(!residual || a.fits(*residual, made), what, "residual does not fit");
    a.check_parameters(bias.numel() >= sizes.tile_count * sizes.filters && tables.numel() >= sizes.gather_at, what);

    const torch::stable::accelerator::DeviceGuard guard(a.device);
    void* stream = current_stream(a.device, what);
    const ConvParams params = a.with_pointers([&](auto... pointers) { return params_of(sizes, pointers...); });
    if (a.type == ScalarType::Float && !needs_wgmma(sizes)) return run_fp32(sizes, params, a.device, stream, what);
    a.with_16bit(what, [&](auto type) {
        using T = decltype(type);
        (needs_wgmma(sizes) ? run_wgmma<T> : run_16bit<T>)(sizes, params, a.device, stream, what);
    });
}

void cuda_block(const Tensor& x, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& weights,
                const Tensor& bias, const Tensor& tables, const std::vector<int64_t>& size_list) {
    const BlockSizes sizes(size_list);
    const std::string what = describe(sizes);
    const Arguments a{x, out, residual, weights, bias, tables};
    const size_t last = sizes.last();
    const int64_t made = sizes.batch * sizes.out_channels * sizes.height(last) * sizes.width(last);
    const bool added = sizes.residual_kind == static_cast<int64_t>(Residual::tensor);
    check(sizes.batch % 8 == 0, what, "the batch is not a multiple of 8");
    check(a.fits(x, sizes.batch * sizes.in_channels * sizes.height(0) * sizes.width(0)), what,
          "x does not fit, or is not aligned to 16 bytes");
    check(a.fits(out, made) && out.data_ptr() != x.data_ptr(), what, "out does not fit, or is x");
    check(residual.has_value() == added && (!added || a.fits(*residual, made)), what, "residual does not fit");
    a.check_parameters(tables.numel() == sizes.tables, what);
    for (size_t i = 0; i < last; ++i) {
        const int64_t end = sizes.region(i, 0) + sizes.region(i, 10) * sizes.region(i, 1);
        check(sizes.region(i, 0) >= 0 && end <= sizes.shared_bytes, what, "a region is outside the shared memory");
    }

    const torch::stable::accelerator::DeviceGuard guard(a.device);
    void* stream = current_stream(a.device, what);
    const BlockLaunch plan = a.with_pointers([&](auto... pointers) { return block_launch(sizes, pointers...); });
    a.with_16bit(what, [&](auto type) { run_block<decltype(type)>(sizes, plan, a.device, stream, what); });
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
