// The kernels that use wgmma (sm_90a), and what they share: the layout of an operand in shared memory. For other
// architectures they are empty, and Python never chooses them there.
//
// PTX ISA, "Asynchronous warpgroup level matrix instructions": an operand is made of core matrices, 8 rows of 16
// bytes; its descriptor holds a start and two strides in bytes. The three forms that are used here, for numbers of
// 16 bits, k the reduction and mn the other dimension:
//   along k    a row: 8 numbers along k of one mn. Core matrices: `stride` apart along mn, `lead` apart along k.
//   along mn   a row: 8 numbers along mn of one k. Core matrices: `stride` apart along mn, `lead` apart along k.
//   swizzled   a row: 64 numbers along mn of one k, 8 rows to an atom of 1,024 bytes, in which the 16-byte pieces
//              of a row are permuted by its number. Atoms: `lead` apart along mn, `stride` apart along k.
#pragma once

#include "chwn_gemm.cuh"
#include "halo_conv.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DSP_HAS_WGMMA 1
#else
#define DSP_HAS_WGMMA 0
#endif

namespace dsp {

// PTX ISA, "Matrix Descriptor": start, lead and stride in units of 16 bytes, and the kind of swizzle (1: 128 bytes).
// A swizzled operand starts at a multiple of 1,024 bytes.
DSP_DEVICE uint64_t operand(int offset, int lead, int stride, bool is_swizzled = false) {
    const auto units = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
    return units(shared_address(offset)) | units(lead) << 16 | units(stride) << 32 |
           static_cast<uint64_t>(is_swizzled) << 62;
}

// A warpgroup's sums are 64 filters x 128 positions: warp w of it holds the fragments of filters 16 w to 16 w + 15,
// which are those of mma.m16n8k16 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16").
using WarpgroupSums = float[1][16][4];

// each_block by warpgroups: multiply(k) starts the products of block k. PENDING blocks are still in flight when the
// next one starts, which occupies as many more stages.
template <int STAGES, int PENDING, class Load, class Multiply>
DSP_DEVICE void each_block_by_warpgroups(int k_blocks, Load load, Multiply multiply) {
    constexpr int kAhead = STAGES - 1 - PENDING;
    for (int k = 0; k < kAhead; ++k) {
        if (k < k_blocks) load(k);
        cp_async_commit();
    }
    for (int k = 0; k < k_blocks; ++k) {
        cp_async_wait<kAhead - 1>();
        fence_async_proxy();
        __syncthreads();
        wgmma_fence();
        multiply(k);
        wgmma_commit();
        if (k + kAhead < k_blocks) load(k + kAhead);
        cp_async_commit();
        wgmma_wait<PENDING>();
    }
    cp_async_wait<0>();
    if (PENDING > 0) wgmma_wait<0>();
}

// Implicit GEMM in CHWN like chwn_gemm.cuh: tiles of 64 or 128 filters, multiplied by wgmma straight from shared
// memory. Filters are the M side, one warpgroup for 64 of them; the 128 positions are the N side, and a gathered row of
// the reduction is what the N-major operand wants: pieces of 8 images, any channel set at no cost. taps: as in
// chwn_gemm.cuh. Weights of a block: [k / 8][filter][8 numbers along k].
template <int FILTERS>
struct WgmmaGemm {
    static constexpr int kBlocks = FILTERS == 64 ? 4 : 2;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = FILTERS * 2, kChunks = 16, kRows = 32, kStages = 4;
    static constexpr int kFilters = FILTERS, kOutputs = kChunks * 8;
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kAtomBytes = 1024;
    static constexpr int kAtoms = kChunks / 8;  // along the positions
    static constexpr int kStageBytes = kWeightBytes + kRows / 8 * kAtoms * kAtomBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static int shared_bytes(int) { return std::max(kStages * kStageBytes, kSumBytes); }
    static_assert(kSumStride % 32 == 8, "store_by_filter");
    static_assert(kWeightBytes % kAtomBytes == 0, "atoms begin at multiples of their size");

    DSP_HD static int place(int row, int chunk) {
        return (row / 8 * kAtoms + chunk / 8) * kAtomBytes + row % 8 * 128 + ((chunk % 8 ^ row % 8) * 16);
    }
};

template <class T, int FILTERS>
__global__ void __launch_bounds__(WgmmaGemm<FILTERS>::kThreads, WgmmaGemm<FILTERS>::kBlocks)
    wgmma_gemm(const __grid_constant__ ConvParams p) {
#if DSP_HAS_WGMMA
    using K = WgmmaGemm<FILTERS>;
    const int block = blockIdx.x, thread = threadIdx.x, warp = thread / 32, group = thread / 128;
    const int tile_number = block % p.tile_count;
    const int chunk = block / p.tile_count * K::kChunks + thread % K::kChunks;
    const Tile tile = p.tiles[tile_number];
    const ChwnColumn column = chwn_column(p, chunk);

    WarpgroupSums sums = {};
    const auto load = [&](int k) { load_block<K>(p, tile, column, k); };
    // One block of the reduction is multiplied while the next one begins.
    each_block_by_warpgroups<K::kStages, 1>(tile.k_blocks, load, [&](int k) {
        const int stage = k % K::kStages * K::kStageBytes;
#pragma unroll
        for (int step = 0; step < K::kRows / 16; ++step)
            wgmma_m64n128k16<T>(sums[0], operand(stage + step * 2 * FILTERS * 16 + group * 64 * 16, FILTERS * 16, 128),
                                operand(stage + K::kWeightBytes + step * 2 * K::kAtoms * K::kAtomBytes, K::kAtomBytes,
                                        K::kAtoms * K::kAtomBytes, true));
    });
    __syncthreads();
    store_by_filter(sums, 0, K::kSumStride, warp * 16);
    __syncthreads();
    const int chunks = output_chunks(p);
    if (chunk < chunks) finish_chunk<T, K>(p, tile_number, chunks, chunk);
#endif
}

// 3x3, stride 1, CHWN: a halo tile like halo_conv.cuh in tiles of 64 filters, multiplied by wgmma straight from shared
// memory. Each of four warpgroups takes one line of the tile: up to 16 chunks (pixels x pieces of 8 images), which are
// contiguous in the halo, so that a tap is just another start of the operand.
// taps: as in halo_conv.cuh. Weights of a block: [tap][k / 8][filter][8 numbers along k].
struct WgmmaHalo {
    static constexpr int kBlocks = 1;  // resident per multiprocessor; bounds the registers
    static constexpr int kLines = 4, kLineChunks = 16, kThreads = kLines * 128, kStages = 3;
    static constexpr int kChannels = 16, kRows = 9 * kChannels;
    static constexpr int kFilters = 64, kChunks = kLines * kLineChunks, kOutputs = kChunks * 8;
    static constexpr int kMostHalo = 192, kPerPass = kThreads / 8;  // chunks of the halo that are copied at once
    static constexpr int kCore = 128;                               // bytes of a core matrix: 8 channels of a chunk
    static constexpr int kWeightBytes = 9 * kFilters * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = kFilters * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    static bool fits(int tile_h, int tile_w, int tile_n) {
        return tile_h <= kLines && tile_w * tile_n <= kLineChunks && halo_chunks(tile_h, tile_w, tile_n) <= kMostHalo;
    }
    // A line is always read 16 chunks long; values behind a shorter one go into sums that are never read.
    DSP_HD static int half_bytes(int halo) { return (halo + kLineChunks) * kCore; }
    DSP_HD static int stage_bytes(int halo) { return kWeightBytes + 2 * half_bytes(halo); }
    static int shared_bytes(int halo) { return std::max(kStages * stage_bytes(halo), kSumBytes); }
};

template <class T>
__global__ void __launch_bounds__(WgmmaHalo::kThreads, WgmmaHalo::kBlocks)
    wgmma_halo(const __grid_constant__ ConvParams p) {
#if DSP_HAS_WGMMA
    using K = WgmmaHalo;
    const int thread = threadIdx.x, warp = thread / 32, group = thread / 128;
    const HaloTile at = halo_tile(p);
    const Tile tile = p.tiles[at.filters];
    const int per_half = K::half_bytes(at.chunks), per_stage = K::stage_bytes(at.chunks);

    int units[K::kMostHalo / K::kPerPass];  // of the chunks of the halo that this thread copies
#pragma unroll
    for (int i = 0; i < K::kMostHalo / K::kPerPass; ++i) units[i] = halo_unit(p, at, i * K::kPerPass + thread / 8);

    const auto load = [&](int k) {
        const int stage = k % K::kStages * per_stage;
        copy_weights<K::kWeightBytes, K::kThreads>(p, tile, k, stage);
        // Eight lanes write the eight channels of a chunk, 128 bytes in one piece.
        const int* channels = p.taps + tile.taps + k * K::kChannels + thread % 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int channel = __ldg(channels + half * 8);
#pragma unroll
            for (int i = 0; i < K::kMostHalo / K::kPerPass; ++i) {
                const int place = i * K::kPerPass + thread / 8;
                if (place < at.chunks)
                    copy_chunk(p, at, stage + K::kWeightBytes + half * per_half + place * K::kCore + thread % 8 * 16,
                               channel, units[i]);
            }
        }
    };

    WarpgroupSums sums = {};
    // With a block of the reduction in flight ptxas would make every single product wait (C7515).
    each_block_by_warpgroups<K::kStages, 0>(tile.k_blocks, load, [&](int k) {
        const int stage = k % K::kStages * per_stage, line = group < p.tile_h ? group : p.tile_h - 1;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
            const int place = ((line + tap / 3) * at.width + tap % 3) * p.tile_n;
            wgmma_m64n128k16<T>(sums[0], operand(stage + tap * K::kFilters * K::kChannels * 2, K::kFilters * 16, 128),
                                operand(stage + K::kWeightBytes + place * K::kCore, per_half, K::kCore));
        }
    });
    __syncthreads();
    store_by_filter(sums, group * K::kLineChunks * 8, K::kSumStride, warp % 4 * 16);
    __syncthreads();
    const int chunk = thread % K::kChunks, line = chunk / K::kLineChunks, along = chunk % K::kLineChunks;
    if (line < p.tile_h && along < p.tile_w * p.tile_n)
        finish_pixel<T, K>(p, at, at.y0 + line, at.x0 + along / p.tile_n, at.n0 + along % p.tile_n);
#endif
}

}  // namespace dsp
