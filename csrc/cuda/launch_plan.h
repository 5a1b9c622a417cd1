// A kernel's parameters, grid and shared memory from the op's list of sizes. Host code, used by the launcher and by the
// emulation.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "chwn_gemm.h"
#include "fp32_gemm.h"
#include "halo_conv.h"
#include "nhwc_gemm.h"
#include "wgmma.h"

namespace dsp {

enum class Kernel { chwn, halo, nhwc, fp32_chwn, fp32_nhwc, wgmma, wgmma_halo, nhwc_sliced };

// The order of the op's `sizes`; dsp_kernels/run/gpu/cuda/conv.py writes them in this order.
struct Sizes {
    int64_t kernel, filters, tile_count, rows_at, runs_at, taps_at, gather_at;
    int64_t stride_y, stride_x, pad_y, pad_x, activation;
    int64_t batch, in_channels, height, width, out_channels, out_height, out_width;
    static constexpr int kCount = 19;

    explicit Sizes(const int64_t* v) { std::memcpy(this, v, sizeof *this); }
};
static_assert(sizeof(Sizes) == Sizes::kCount * sizeof(int64_t), "one field per size");

struct Launch {
    ConvParams params;
    int64_t blocks;
    int threads, shared_bytes;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chooses pixels and chunks of a halo block: the split that reads the fewest sectors and wastes the fewest outputs.
// A single chunk is half of a 32-byte sector, so it costs twice. Throws if nothing fits into shared memory.
template <class K>
void choose_halo_tile(ConvParams& p, int64_t shared_limit, int64_t& position_blocks) {
    const int n8 = p.batch / 8;
    double best = 0;
    position_blocks = 0;
    for (int n = 1; n <= 4 && n <= n8; n *= 2)
        for (int h = 1; h <= K::kChunks && h <= p.out_height; ++h)
            for (int w = 1; w <= K::kChunks && w <= p.out_width; ++w) {
                const int halo = halo_chunks(h, w, n);
                if (!K::fits(h, w, n) || halo > K::kMostHalo || K::shared_bytes(halo) > shared_limit) continue;
                const int64_t blocks = divide_up(p.out_height, h) * divide_up(p.out_width, w) * divide_up(n8, n);
                const double cost = static_cast<double>(blocks) * (halo * (n == 1 ? 2 : 1) + K::kChunks);
                if (position_blocks && cost >= best) continue;
                best = cost, position_blocks = blocks;
                p.tile_h = h, p.tile_w = w, p.tile_n = n;
            }
    if (!position_blocks) throw std::runtime_error("no tile fits into shared memory");
    p.blocks_x = static_cast<int>(divide_up(p.out_width, p.tile_w));
    p.blocks_n = static_cast<int>(divide_up(n8, p.tile_n));
}

// The launch of a GEMM over `positions` in blocks of `per_block`, and that of a halo kernel.
template <class K>
Launch gemm_launch(const ConvParams& p, int64_t positions, int per_block) {
    return {p, divide_up(positions, per_block) * p.tile_count, K::kThreads, K::kSharedBytes};
}

template <class K>
Launch halo_launch(ConvParams p, int64_t shared_limit) {
    int64_t blocks;
    choose_halo_tile<K>(p, shared_limit, blocks);
    const int bytes = K::shared_bytes(halo_chunks(p.tile_h, p.tile_w, p.tile_n));
    return {p, blocks * p.tile_count, K::kThreads, bytes};
}

inline ConvParams params_of(const Sizes& s, const void* x, void* out, const void* residual, const void* weights,
                            const float* bias, const int* tables) {
    const auto whole = [](int64_t value) { return static_cast<int>(value); };
    ConvParams p{};
    p.x = x, p.out = out, p.residual = residual, p.weights = weights, p.bias = bias;
    p.tiles = reinterpret_cast<const Tile*>(tables);
    p.rows = tables + s.rows_at, p.runs = tables + s.runs_at;
    p.taps = tables + s.taps_at, p.gather = tables + s.gather_at;
    p.tile_count = whole(s.tile_count), p.activation = whole(s.activation), p.batch = whole(s.batch);
    p.in_channels = whole(s.in_channels), p.out_channels = whole(s.out_channels);
    p.height = whole(s.height), p.width = whole(s.width);
    p.out_height = whole(s.out_height), p.out_width = whole(s.out_width);
    p.stride_y = whole(s.stride_y), p.stride_x = whole(s.stride_x);
    p.pad_y = whole(s.pad_y), p.pad_x = whole(s.pad_x);
    return p;
}

[[noreturn]] inline void no_kernel(const char* kind, const Sizes& s) {
    throw std::runtime_error(std::string("there is no ") + kind + " kernel " + std::to_string(s.kernel) + " of " +
                             std::to_string(s.filters) + " filters");
}

// Calls run(kernel, launch) with the kernel of these sizes.
template <class T, class Run>
void dispatch_16bit(const Sizes& s, const ConvParams& p, int64_t shared_limit, Run&& run) {
    const auto gemm = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel, gemm_launch<K>(p, output_chunks(p), K::kChunks));
    };
    const auto halo = [&](auto kernel) { run(kernel, halo_launch<decltype(kernel)>(p, shared_limit)); };
    const auto nhwc = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel, gemm_launch<K>(p, s.batch * s.out_height * s.out_width, K::kPositions));
    };
    switch (static_cast<Kernel>(s.kernel)) {
        case Kernel::chwn:
            if (s.filters == 16) return gemm(ChwnGemm<T, 16>{});
            if (s.filters == 32) return gemm(ChwnGemm<T, 32>{});
            if (s.filters == 64) return gemm(ChwnGemm<T, 64>{});
            break;
        case Kernel::halo:
            if (s.filters == 16) return halo(HaloConv<T, 16>{});
            if (s.filters == 32) return halo(HaloConv<T, 32>{});
            if (s.filters == 64) return halo(HaloConv<T, 64>{});
            break;
        case Kernel::nhwc:
            if (s.filters == 16) return nhwc(NhwcGemm<T, 16>{});
            if (s.filters == 32) return nhwc(NhwcGemm<T, 32>{});
            break;
        case Kernel::nhwc_sliced:
            if (s.filters == 16) return nhwc(NhwcGemm<T, 16, 4>{});
            if (s.filters == 32) return nhwc(NhwcGemm<T, 32, 4>{});
            break;
        default:
            break;
    }
    no_kernel("16-bit", s);
}

inline bool needs_wgmma(const Sizes& s) {
    return static_cast<Kernel>(s.kernel) == Kernel::wgmma || static_cast<Kernel>(s.kernel) == Kernel::wgmma_halo;
}

// The same for the kernels of sm_90a, which run on another machine.
template <class T, class Run>
void dispatch_wgmma(const Sizes& s, const ConvParams& p, int64_t shared_limit, Run&& run) {
    const auto gemm = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel, gemm_launch<K>(p, output_chunks(p), K::kChunks));
    };
    const bool halo = static_cast<Kernel>(s.kernel) == Kernel::wgmma_halo;
    using Halo = WgmmaHalo<T, 64>;
    if (halo && s.filters == 64) return run(Halo{}, halo_launch<Halo>(p, shared_limit));
    if (!halo && s.filters == 64) return gemm(WgmmaGemm<T, 64>{});
    if (!halo && s.filters == 128) return gemm(WgmmaGemm<T, 128>{});
    no_kernel("wgmma", s);
}

template <class Run>
void dispatch_fp32(const Sizes& s, const ConvParams& p, Run&& run) {
    const auto gemm = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel, gemm_launch<K>(p, K::positions_of(p), K::kPositions));
    };
    if (s.filters == 32 && static_cast<Kernel>(s.kernel) == Kernel::fp32_chwn) return gemm(Fp32Gemm<false>{});
    if (s.filters == 32 && static_cast<Kernel>(s.kernel) == Kernel::fp32_nhwc) return gemm(Fp32Gemm<true>{});
    no_kernel("float32", s);
}

}  // namespace dsp
