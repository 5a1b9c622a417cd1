// Finds the kernel of a launch and its grid and shared memory, launches it and checks every step.
#include "launch.h"

#include <cuda_runtime.h>

#include <limits>
#include <set>
#include <stdexcept>
#include <utility>

#include "kernels.cuh"

namespace dsp {
namespace {

const Kernels& all_kernels() {
    static const Kernels all = [] {
        Kernels made;
        for (const auto add : {add_float16_kernels, add_bfloat16_kernels, add_float32_kernels, add_wgmma_kernels})
            add(made);
        return made;
    }();
    return all;
}

void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The most bytes of shared memory of one thread block.
int shared_limit(int device) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "querying the shared memory of a block");
    return bytes;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Params>
void launch(void (*function)(Params), const Params& params, int64_t blocks, int threads, int shared_bytes, int device,
            void* stream) {
    if (blocks > std::numeric_limits<int>::max()) throw std::runtime_error("too many thread blocks");
    if (blocks == 0) return;
    // More than 48 KB must be requested once per kernel and device; it is a setting, not work on a stream.
    static thread_local std::set<std::pair<void (*)(Params), int>> granted;
    if (shared_bytes > 48 * 1024 && !granted.count({function, device})) {
        check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit(device)),
                   "requesting shared memory");
        granted.insert({function, device});
    }
    function<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    check_cuda(cudaGetLastError(), "launching the kernel");
}

// Chooses pixels and chunks of a halo block: the split that reads the fewest sectors and wastes the fewest outputs.
// A single chunk is half of a 32-byte sector, so it costs twice. The number of blocks for each tile of filters.
int64_t choose_halo_tile(const ConvKernel& kernel, ConvParams& p, int limit) {
    const int n8 = p.batch / 8, chunks = kernel.outputs / 8;
    double best = 0;
    int64_t found = 0;
    for (int n = 1; n <= 4 && n <= n8; n *= 2)
        for (int h = 1; h <= chunks && h <= p.out_height; ++h)
            for (int w = 1; w <= chunks && w <= p.out_width; ++w) {
                const int halo = (h + 2) * (w + 2) * n;
                if (!kernel.fits(h, w, n) || kernel.shared_bytes(halo) > limit) break;  // nor do wider ones
                const int64_t blocks = divide_up(p.out_height, h) * divide_up(p.out_width, w) * divide_up(n8, n);
                const double cost = static_cast<double>(blocks) * (halo * (n == 1 ? 2 : 1) + chunks);
                if (found && cost >= best) continue;
                best = cost, found = blocks;
                p.tile_h = h, p.tile_w = w, p.tile_n = n;
            }
    if (!found) throw std::runtime_error("no tile fits into shared memory");
    p.blocks_x = static_cast<int>(divide_up(p.out_width, p.tile_w));
    p.blocks_n = static_cast<int>(divide_up(n8, p.tile_n));
    return found;
}

}  // namespace

void launch_conv(const ConvSizes& sizes, const Tensors& tensors, Dtype dtype, int device, void* stream) {
    ConvParams p{};
    static_cast<ConvSizes&>(p) = sizes, static_cast<Tensors&>(p) = tensors;
    p.tiles = reinterpret_cast<const Tile*>(p.tables);
    p.rows = p.tables + p.rows_at, p.runs = p.tables + p.runs_at;
    p.taps = p.tables + p.taps_at, p.gather = p.tables + p.gather_at;
    for (const ConvKernel& k : all_kernels().convs) {
        if (static_cast<int>(k.kernel) != p.kernel || k.dtype != dtype || k.filters != p.filters) continue;
        const int64_t positions = static_cast<int64_t>(p.batch) * p.out_height * p.out_width;
        const int64_t blocks = k.fits ? choose_halo_tile(k, p, shared_limit(device)) : divide_up(positions, k.outputs);
        const int halo = (p.tile_h + 2) * (p.tile_w + 2) * p.tile_n;
        return launch(k.function, p, blocks * p.tile_count, k.threads, k.shared_bytes(halo), device, stream);
    }
    throw std::runtime_error("there is no such kernel for this dtype");
}

void launch_block(const BlockSizes& sizes, const Tensors& tensors, Dtype dtype, int device, void* stream) {
    BlockParams p{};
    static_cast<BlockSizes&>(p) = sizes, static_cast<Tensors&>(p) = tensors;
    const BlockRegion& output = p.regions[p.conv_count];
    p.chunks_of_batch = p.batch / 8;
    p.blocks_x = static_cast<int>(divide_up(output.width, output.columns));
    p.blocks_n = static_cast<int>(divide_up(p.chunks_of_batch, p.tile_n));
    const int64_t blocks_y = divide_up(output.height, static_cast<int64_t>(output.rows) * p.turns);
    for (const BlockKernel& k : all_kernels().blocks)
        if (k.dtype == dtype && k.filters == p.filters)
            return launch(k.function, p, blocks_y * p.blocks_x * p.blocks_n, k.threads, p.shared_bytes, device, stream);
    throw std::runtime_error("there is no such block kernel for this dtype");
}

void use_device(int device) { check_cuda(cudaSetDevice(device), "setting the device"); }

std::string describe_kernels() {
#define DSP_QUOTED(name) #name,
    static const char* const kernels[] = {DSP_KERNELS(DSP_QUOTED)};
    static const char* const dtypes[] = {"float16", "bfloat16", "float32"};
    std::string text;
    for (const ConvKernel& k : all_kernels().convs)
        text += std::string(kernels[static_cast<int>(k.kernel)]) + " " + dtypes[static_cast<int>(k.dtype)] +
                " filters=" + std::to_string(k.filters) + " rows=" + std::to_string(k.rows) +
                " weights=" + k.weight_order + "\n";
    return text;
}

}  // namespace dsp
