// A block kernel's parameters, grid and shared memory from the op's list of sizes. Host code, used by the launcher and
// by the emulation.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "block_kernel.h"

namespace dsp {

struct BlockLaunch {
    BlockParams params;
    int64_t blocks;
    int threads, shared_bytes;
};

// The order of the op's `sizes`, before those of regions and convolutions; dsp_kernels/run/gpu/cuda/blocks/conv.py
// writes them in this order.
struct BlockHead {
    int64_t filters, batch, in_channels, out_channels, tile_n, turns, shared_bytes, conv_count, residual_kind;
    int64_t channels_at, targets_at, residuals_at, tables, shortcut_stride_y, shortcut_stride_x;
};

struct BlockSizes : BlockHead {
    static constexpr size_t kHead = sizeof(BlockHead) / sizeof(int64_t), kPerRegion = 11, kPerConv = 6;
    std::vector<int64_t> regions, convs;

    // Throws if the length of the list does not match its number of convolutions.
    explicit BlockSizes(const std::vector<int64_t>& v) {
        if (v.size() < kHead) throw std::runtime_error("dsp_kernels::cuda_block: too few sizes");
        std::memcpy(static_cast<BlockHead*>(this), v.data(), sizeof(BlockHead));
        if (conv_count < 1 || conv_count > kMostConvs)
            throw std::runtime_error("dsp_kernels::cuda_block: " + std::to_string(conv_count) + " convolutions");
        const size_t count = static_cast<size_t>(conv_count), middle = kHead + (count + 1) * kPerRegion;
        if (v.size() != middle + count * kPerConv)
            throw std::runtime_error("dsp_kernels::cuda_block: wrong number of sizes");
        regions.assign(v.begin() + kHead, v.begin() + static_cast<int64_t>(middle));
        convs.assign(v.begin() + static_cast<int64_t>(middle), v.end());
    }
    // Of region `number`, in the order of BlockRegion.
    int64_t region(size_t number, size_t field) const { return regions[number * kPerRegion + field]; }
    int64_t height(size_t number) const { return region(number, 4); }
    int64_t width(size_t number) const { return region(number, 5); }
    size_t last() const { return static_cast<size_t>(conv_count); }
};

inline BlockLaunch block_launch(const BlockSizes& s, const void* x, void* out, const void* residual,
                                const void* weights, const float* bias, const int* tables) {
    const auto whole = [](int64_t value) { return static_cast<int>(value); };
    BlockParams p{};
    p.x = x, p.out = out, p.residual = residual, p.weights = weights, p.bias = bias, p.tables = tables;
    p.channels_at = whole(s.channels_at), p.targets_at = whole(s.targets_at), p.residuals_at = whole(s.residuals_at);
    p.conv_count = whole(s.conv_count), p.turns = whole(s.turns);
    p.residual_kind = whole(s.residual_kind);
    p.shortcut_stride_y = whole(s.shortcut_stride_y), p.shortcut_stride_x = whole(s.shortcut_stride_x);
    p.chunks_of_batch = whole(s.batch / 8), p.tile_n = whole(s.tile_n), p.by_tile_n = divisor_of(p.tile_n);
    for (size_t i = 0; i <= s.last(); ++i) {
        const auto field = [&](size_t number) { return whole(s.region(i, number)); };
        BlockRegion& r = p.regions[i];
        r = {field(0), field(1), field(2), field(3),  field(4), field(5), field(6),
             field(7), field(8), field(9), field(10), 0,        0};
        r.by_column = divisor_of(r.columns);
        const int64_t chunks = static_cast<int64_t>(r.rows) * r.columns * p.tile_n;
        if (p.turns < 1 || r.rows < 1 || r.columns < 1 || p.tile_n < 1 || chunks > kMostChunks ||
            r.columns > kLargestDivisor || p.tile_n > kLargestDivisor)
            throw std::runtime_error("a tile of " + std::to_string(r.rows) + "x" + std::to_string(r.columns) +
                                     " pixels is too large for the block kernel");
    }
    for (size_t i = 0; i < s.last(); ++i) {
        const auto field = [&](size_t number) { return whole(s.convs[i * BlockSizes::kPerConv + number]); };
        p.convs[i] = {field(0), field(1), field(2), field(3), field(4), field(5)};
    }
    const BlockRegion& output = p.regions[p.conv_count];
    const auto blocks_along = [](int64_t all, int64_t each) { return (all + each - 1) / each; };
    const int64_t blocks_x = blocks_along(output.width, output.columns);
    const int64_t blocks_n = blocks_along(p.chunks_of_batch, p.tile_n);
    for (size_t i = 0; i < s.last(); ++i) {
        BlockRegion& r = p.regions[i];
        const int further = output.rows * r.step_y;
        r.kept = r.rows > further ? r.rows - further : 0;
    }
    p.blocks_x = whole(blocks_x), p.blocks_n = whole(blocks_n);
    return {p, blocks_along(output.height, static_cast<int64_t>(output.rows) * p.turns) * blocks_x * blocks_n, 0,
            whole(s.shared_bytes)};
}

// Calls run(kernel, launch) with the kernel of this many filters per tile.
template <class T, class Run>
void dispatch_block(int64_t filters, BlockLaunch plan, Run&& run) {
    const auto with = [&](auto kernel) {
        plan.threads = decltype(kernel)::kThreads;
        run(kernel, plan);
    };
    if (filters == 16) return with(FusedBlock<T, 16>{});
    if (filters == 32) return with(FusedBlock<T, 32>{});
    throw std::runtime_error("there is no block kernel of " + std::to_string(filters) + " filters");
}

}  // namespace dsp
