// dsp_kernels::cuda_block, the launcher of whole residual blocks as a torch op, registered through LibTorch's stable
// ABI. Python (dsp_kernels/run/gpu/cuda/blocks/conv.py) has checked shapes and made tables and geometry; what is checked
// again here is what would let a kernel leave its tensors.
#include "block_runners.h"
#include "op_checks.h"

namespace {

using dsp::check;
using dsp::ScalarType;
using dsp::Tensor;

std::string describe(const dsp::BlockSizes& s) {
    const auto map = [&](size_t number) {
        return std::to_string(s.height(number)) + "x" + std::to_string(s.width(number));
    };
    const auto tile = [&](size_t number) {
        return std::to_string(s.region(number, 2)) + "x" + std::to_string(s.region(number, 3));
    };
    return "CUDA block kernel of " + std::to_string(s.conv_count) + " convolutions and " + std::to_string(s.filters) +
           " filters, batch " + std::to_string(s.batch) + ", " + std::to_string(s.in_channels) + " channels of " +
           map(0) + " to " + std::to_string(s.out_channels) + " of " + map(s.last()) + ", tiles of " +
           tile(s.last()) + "x" + std::to_string(8 * s.tile_n) + " with " + std::to_string(s.shared_bytes) + " bytes";
}

void cuda_block(const Tensor& x, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& weights,
                const Tensor& bias, const Tensor& tables, const std::vector<int64_t>& size_list) {
    const dsp::BlockSizes sizes(size_list);
    const std::string what = describe(sizes);
    const ScalarType type = x.scalar_type();
    const int device = x.get_device_index();
    const auto fits = [&](const Tensor& t, int64_t numel) {
        return dsp::lies(t, type, device) && t.numel() == numel;
    };
    const size_t last = sizes.last();
    const int64_t in = sizes.batch * sizes.in_channels * sizes.height(0) * sizes.width(0);
    const int64_t made = sizes.batch * sizes.out_channels * sizes.height(last) * sizes.width(last);
    const bool added = sizes.residual_kind == static_cast<int64_t>(dsp::Residual::tensor);
    check(sizes.batch % 8 == 0, what, "the batch is no multiple of 8");
    check(fits(x, in), what, "x does not fit, or is not at a multiple of 16 bytes");
    check(fits(out, made) && out.data_ptr() != x.data_ptr(), what, "out does not fit, or is x");
    check(residual.has_value() == added && (!added || fits(*residual, made)), what, "residual does not fit");
    check(dsp::lies(weights, type, device) && dsp::lies(bias, ScalarType::Float, device) &&
              dsp::lies(tables, ScalarType::Int, device) && tables.numel() == sizes.tables,
          what, "weights, bias or tables do not fit");
    for (size_t i = 0; i < last; ++i) {
        check(sizes.region(i, 0) >= 0 && sizes.region(i, 0) + sizes.region(i, 10) * sizes.region(i, 1) <= sizes.shared_bytes,
              what, "a region lies outside of the shared memory");
    }

    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = dsp::current_stream(device, what);
    const dsp::BlockLaunch plan =
        dsp::block_launch(sizes, x.data_ptr(), out.data_ptr(), dsp::pointer_or_null(residual),
                          weights.data_ptr(), static_cast<const float*>(bias.data_ptr()),
                          static_cast<const int*>(tables.data_ptr()));
    if (type == ScalarType::Half)
        dsp::run_block_half(sizes, plan, device, stream, what);
    else if (type == ScalarType::BFloat16)
        dsp::run_block_bfloat(sizes, plan, device, stream, what);
    else
        check(false, what, "x is not float16 or bfloat16");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsp_kernels, m) {
    m.def(
        "cuda_block(Tensor x, Tensor(a!) out, Tensor? residual, Tensor weights, Tensor bias, Tensor tables, "
        "int[] sizes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dsp_kernels, CUDA, m) { m.impl("cuda_block", TORCH_BOX(&cuda_block)); }
