// From the op's list of sizes to a kernel's parameters, its grid and its shared memory. Host code, used by the
// launcher and by the emulation.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "chwn_gemm.h"
#include "fp32_gemm.h"
#include "halo_conv.h"
#include "nhwc_gemm.h"
#include "wgmma_gemm.h"
#include "wgmma_halo.h"

namespace dsp {

enum class Kernel { chwn, halo, nhwc, fp32_chwn, fp32_nhwc, wgmma, wgmma_halo, nhwc_sliced };

// The order of the op's `sizes`; dsp_kernels/run/gpu/cuda/conv.py writes them in this order.
struct Sizes {
    int64_t kernel, filters, tile_count, rows_at, runs_at, taps_at, gather_at;
    int64_t stride_y, stride_x, pad_y, pad_x, activation;
    int64_t batch, in_channels, height, width, out_channels, out_height, out_width;
    static constexpr int kCount = 19;

    explicit Sizes(const int64_t* v)
        : kernel(v[0]), filters(v[1]), tile_count(v[2]), rows_at(v[3]), runs_at(v[4]), taps_at(v[5]),
          gather_at(v[6]), stride_y(v[7]), stride_x(v[8]), pad_y(v[9]), pad_x(v[10]), activation(v[11]),
          batch(v[12]), in_channels(v[13]), height(v[14]), width(v[15]), out_channels(v[16]), out_height(v[17]),
          out_width(v[18]) {}
};

struct Launch {
    ConvParams params;
    int64_t blocks;
    int threads, shared_bytes;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels and chunks of a halo block: the split that reads the fewest sectors and wastes the fewest outputs.
// A chunk alone is half of a 32-byte sector, so it costs twice. Throws if nothing fits into shared memory.
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
                const int64_t blocks =
                    divide_up(p.out_height, h) * divide_up(p.out_width, w) * divide_up(n8, n);
                const double cost = static_cast<double>(blocks) * (halo * (n == 1 ? 2 : 1) + K::kChunks);
                if (position_blocks && cost >= best) continue;
                best = cost, position_blocks = blocks;
                p.tile_h = h, p.tile_w = w, p.tile_n = n;
            }
    if (!position_blocks) throw std::runtime_error("no tile fits into shared memory");
    p.blocks_x = static_cast<int>(divide_up(p.out_width, p.tile_w));
    p.blocks_n = static_cast<int>(divide_up(n8, p.tile_n));
}

template <class K>
int halo_bytes(const ConvParams& p) {
    return K::shared_bytes(halo_chunks(p.tile_h, p.tile_w, p.tile_n));
}

inline ConvParams params_of(const Sizes& s, const void* x, void* out, const void* residual, const void* weights,
                            const float* bias, const int* tables) {
    ConvParams p{};
    p.x = x, p.out = out, p.residual = residual, p.weights = weights, p.bias = bias;
    p.tiles = reinterpret_cast<const Tile*>(tables);
    p.rows = tables + s.rows_at, p.runs = tables + s.runs_at;
    p.taps = tables + s.taps_at, p.gather = tables + s.gather_at;
    p.tile_count = static_cast<int>(s.tile_count);
    p.in_channels = static_cast<int>(s.in_channels), p.out_channels = static_cast<int>(s.out_channels);
    p.batch = static_cast<int>(s.batch);
    p.height = static_cast<int>(s.height), p.width = static_cast<int>(s.width);
    p.out_height = static_cast<int>(s.out_height), p.out_width = static_cast<int>(s.out_width);
    p.stride_y = static_cast<int>(s.stride_y), p.stride_x = static_cast<int>(s.stride_x);
    p.pad_y = static_cast<int>(s.pad_y), p.pad_x = static_cast<int>(s.pad_x);
    p.activation = static_cast<int>(s.activation);
    return p;
}

// Calls run(kernel type, parameters, position blocks, shared bytes) with the kernel of these sizes.
// Run has `template <class K> void operator()(const Launch&)`.
template <class T, class Run>
void dispatch_16bit(const Sizes& s, ConvParams p, int64_t shared_limit, Run&& run) {
    const auto gemm = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel, Launch{p, divide_up(output_chunks(p), K::kChunks) * p.tile_count, K::kThreads, K::kSharedBytes});
    };
    const auto halo = [&](auto kernel) {
        using K = decltype(kernel);
        int64_t blocks;
        choose_halo_tile<K>(p, shared_limit, blocks);
        run(kernel, Launch{p, blocks * p.tile_count, K::kThreads, halo_bytes<K>(p)});
    };
    const auto nhwc = [&](auto kernel) {
        using K = decltype(kernel);
        const int64_t positions = s.batch * s.out_height * s.out_width;
        run(kernel, Launch{p, divide_up(positions, K::kPositions) * p.tile_count, K::kThreads, K::kSharedBytes});
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
    throw std::runtime_error("there is no 16-bit kernel " + std::to_string(s.kernel) + " of " +
                             std::to_string(s.filters) + " filters");
}

inline bool needs_wgmma(const Sizes& s) {
    return static_cast<Kernel>(s.kernel) == Kernel::wgmma || static_cast<Kernel>(s.kernel) == Kernel::wgmma_halo;
}

// The same for the kernels of sm_90a, which another machine runs.
template <class T, class Run>
void dispatch_wgmma(const Sizes& s, ConvParams p, int64_t shared_limit, Run&& run) {
    const auto gemm = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel, Launch{p, divide_up(output_chunks(p), K::kChunks) * p.tile_count, K::kThreads, K::kSharedBytes});
    };
    const bool halo = static_cast<Kernel>(s.kernel) == Kernel::wgmma_halo;
    if (halo && s.filters == 64) {
        using K = WgmmaHalo<T, 64>;
        int64_t blocks;
        choose_halo_tile<K>(p, shared_limit, blocks);
        return run(K{}, Launch{p, blocks * p.tile_count, K::kThreads, halo_bytes<K>(p)});
    }
    if (!halo && s.filters == 64) return gemm(WgmmaGemm<T, 64>{});
    if (!halo && s.filters == 128) return gemm(WgmmaGemm<T, 128>{});
    throw std::runtime_error("there is no wgmma kernel " + std::to_string(s.kernel) + " of " +
                             std::to_string(s.filters) + " filters");
}

template <class Run>
void dispatch_fp32(const Sizes& s, const ConvParams& p, Run&& run) {
    const auto gemm = [&](auto kernel) {
        using K = decltype(kernel);
        run(kernel,
            Launch{p, divide_up(K::positions_of(p), K::kPositions) * p.tile_count, K::kThreads, K::kSharedBytes});
    };
    if (s.filters == 32 && static_cast<Kernel>(s.kernel) == Kernel::fp32_chwn) return gemm(Fp32Gemm<false>{});
    if (s.filters == 32 && static_cast<Kernel>(s.kernel) == Kernel::fp32_nhwc) return gemm(Fp32Gemm<true>{});
    throw std::runtime_error("there is no float32 kernel " + std::to_string(s.kernel) + " of " +
                             std::to_string(s.filters) + " filters");
}

}  // namespace dsp
