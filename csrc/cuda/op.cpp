// dsp_kernels::cuda_conv, the launcher as a torch op, registered through LibTorch's stable ABI. Python
// (dsp_kernels/run/gpu/cuda/conv.py) has checked shapes and made the tables; what is checked again here is what would
// let a kernel leave its tensors.
#include "op_checks.h"
#include "runners.h"

// Whether this library holds the kernels of sm_90a (build_cuda.py defines it); Python asks through ctypes.
extern "C" __attribute__((visibility("default"))) int dsp_kernels_has_wgmma() { return DSP_KERNELS_WGMMA; }

namespace {

using dsp::check;
using dsp::ScalarType;
using dsp::Tensor;

std::string describe(const dsp::Sizes& s) {
    static const char* const kNames[] = {"chwn", "halo", "nhwc", "fp32_chwn", "fp32_nhwc", "wgmma", "wgmma_halo", "nhwc_sliced"};
    const auto two = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
    const std::string name = s.kernel >= 0 && s.kernel < 8 ? kNames[s.kernel] : std::to_string(s.kernel);
    return "CUDA kernel " + name + " of " + std::to_string(s.filters) + " filters, batch " +
           std::to_string(s.batch) + ", " + std::to_string(s.in_channels) + " channels of " +
           two(s.height, s.width) + " to " + std::to_string(s.out_channels) + " of " +
           two(s.out_height, s.out_width) + ", " + std::to_string(s.tile_count) + " tiles";
}

void cuda_conv(const Tensor& x, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& weights,
               const Tensor& bias, const Tensor& tables, const std::vector<int64_t>& size_list) {
    check(size_list.size() == dsp::Sizes::kCount, "dsp_kernels::cuda_conv", "wrong number of sizes");
    const dsp::Sizes sizes(size_list.data());
    const std::string what = describe(sizes);
    const ScalarType type = x.scalar_type();
    const int device = x.get_device_index();
    const auto fits = [&](const Tensor& t, int64_t numel) {
        return dsp::lies(t, type, device) && t.numel() == numel;
    };
    const int64_t in = sizes.batch * sizes.in_channels * sizes.height * sizes.width;
    const int64_t made = sizes.batch * sizes.out_channels * sizes.out_height * sizes.out_width;
    check(fits(x, in), what, "x does not fit, or is not at a multiple of 16 bytes");
    check(fits(out, made), what, "out does not fit, or is not at 16 bytes");
    check(!residual || fits(*residual, made), what, "residual does not fit");
    check(dsp::lies(weights, type, device) && dsp::lies(bias, ScalarType::Float, device) &&
              bias.numel() >= sizes.tile_count * sizes.filters && dsp::lies(tables, ScalarType::Int, device) &&
              tables.numel() >= sizes.gather_at,
          what, "weights, bias or tables do not fit");

    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = dsp::current_stream(device, what);
    const dsp::ConvParams params =
        dsp::params_of(sizes, x.data_ptr(), out.data_ptr(), dsp::pointer_or_null(residual),
                       weights.data_ptr(), static_cast<const float*>(bias.data_ptr()),
                       static_cast<const int*>(tables.data_ptr()));
    if (dsp::needs_wgmma(sizes)) {
        check(type == ScalarType::Half || type == ScalarType::BFloat16, what, "x is not float16 or bfloat16");
        dsp::run_wgmma(type == ScalarType::Half, sizes, params, device, stream, what);
    } else if (type == ScalarType::Half)
        dsp::run_half(sizes, params, device, stream, what);
    else if (type == ScalarType::BFloat16)
        dsp::run_bfloat(sizes, params, device, stream, what);
    else if (type == ScalarType::Float)
        dsp::run_fp32(sizes, params, device, stream, what);
    else
        check(false, what, "x is not float16, bfloat16 or float32");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsp_kernels, m) {
    m.def(
        "cuda_conv(Tensor x, Tensor(a!) out, Tensor? residual, Tensor weights, Tensor bias, Tensor tables, "
        "int[] sizes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dsp_kernels, CUDA, m) { m.impl("cuda_conv", TORCH_BOX(&cuda_conv)); }
