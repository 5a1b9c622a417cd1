// The kernels that use wgmma (sm_90a), and what they share: the layout of an operand in shared memory.
//
// PTX ISA, "Asynchronous warpgroup level matrix instructions": an operand is made of core matrices, 8 rows of 16
// bytes; its descriptor holds a start and two strides in bytes. The three forms that are used here, for numbers of
// 16 bits, k the reduction and mn the other dimension:
//   along_k    a row: 8 numbers along k of one mn. Core matrices: `stride` apart along mn, `lead` apart along k.
//   along_mn   a row: 8 numbers along mn of one k. Core matrices: `stride` apart along mn, `lead` apart along k.
//   swizzled   a row: 64 numbers along mn of one k, 8 rows to an atom of 1,024 bytes, in which the 16-byte pieces
//              of a row are permuted by its number. Atoms: `lead` apart along mn, `stride` apart along k.
#pragma once

#include "chwn_gemm.h"
#include "halo_conv.h"

namespace dsp {

enum class Order { along_k, along_mn, swizzled };

template <Order ORDER>
struct Operand {
    static constexpr Order order = ORDER;
    int offset, lead, stride;  // bytes; offset from the start of shared memory
};

// PTX ISA, "Matrix Descriptor": start, lead and stride in units of 16 bytes, and the kind of swizzle (1: 128 bytes).
// shared_address: of the start of shared memory, a multiple of 1,024, as is the offset of a swizzled operand.
template <Order ORDER>
DSP_HD uint64_t descriptor_of(const Operand<ORDER>& operand, uint32_t shared_address) {
    const auto units = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
    return units(shared_address + operand.offset) | units(operand.lead) << 16 | units(operand.stride) << 32 |
           static_cast<uint64_t>(ORDER == Order::swizzled) << 62;
}

// Byte offset of a 16-byte piece in an atom of the swizzled form.
DSP_HD constexpr int in_atom(int k, int piece) { return k * 128 + ((piece ^ k) * 16); }

// A warpgroup's sums are 64 filters x 8 * NT positions: warp w of it holds the fragments of filters 16 w to
// 16 w + 15, which are those of mma.m16n8k16 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16").
template <class M, int NT>
using WarpgroupSums = Sums<M, 1, NT>;

// each_block by warpgroups: multiply(group, k) starts the products of block k. PENDING blocks are still in flight when
// the next one starts, which occupies as many more stages.
template <int STAGES, int PENDING, class M, class S, class Load, class Multiply>
DSP_FN void each_block_by_warpgroups(M& m, int k_blocks, S& sums, Load load, Multiply multiply) {
    constexpr int kAhead = STAGES - 1 - PENDING;
    for (int k = 0; k < kAhead; ++k) {
        if (k < k_blocks) load(k);
        m.commit();
    }
    for (int k = 0; k < k_blocks; ++k) {
        m.template wait<kAhead - 1>();
        m.publish();
        m.sync();
        m.each_warpgroup([&](int group) {
            m.begin_products();
            multiply(group, k);
            m.commit_products();
        });
        if (k + kAhead < k_blocks) load(k + kAhead);
        m.commit();
        m.template wait_products<PENDING>(sums);
    }
    m.template wait<0>();
    if (PENDING > 0) m.template wait_products<0>(sums);
}

// Implicit GEMM in CHWN like chwn_gemm.h, for sm_90a: tiles of 64 or 128 filters, multiplied by wgmma straight from
// shared memory. Filters are the M side, one warpgroup for 64 of them; the 128 positions are the N side, and a gathered
// row of the reduction is what the N-major operand wants: pieces of 8 images, any channel set at no cost.
// taps: as in chwn_gemm.h. Weights of a block: [k / 8][filter][8 numbers along k].
template <class T, int FILTERS>
struct WgmmaGemm {
    static constexpr int kBlocks = FILTERS == 64 ? 4 : 2;  // resident per multiprocessor; bounds the registers
    static constexpr int kThreads = FILTERS * 2, kChunks = 16, kRows = 32, kStages = 4;
    static constexpr int kFilters = FILTERS, kNT = kChunks;  // n tiles of a warpgroup
    static constexpr int kWeightBytes = FILTERS * kRows * 2, kAtomBytes = 1024;
    static constexpr int kAtoms = kChunks / 8;  // along the positions
    static constexpr int kStageBytes = kWeightBytes + kRows / 8 * kAtoms * kAtomBytes;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
    static_assert(kSumStride % 32 == 8, "store_by_filter");
    static_assert(kWeightBytes % kAtomBytes == 0, "atoms begin at multiples of their size");

    DSP_HD static int place(int row, int chunk) {
        return (row / 8 * kAtoms + chunk / 8) * kAtomBytes + in_atom(row % 8, chunk % 8);
    }

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const int tile_number = block % p.tile_count;
        const int first_chunk = block / p.tile_count * kChunks;
        const Tile tile = p.tiles[tile_number];

        typename M::template PerThread<ChwnColumn> columns;
        m.each_thread([&](int thread) { columns[thread] = chwn_column(p, first_chunk + thread % kChunks); });
        const auto load = [&](int k) { load_block<WgmmaGemm>(m, p, tile, columns, k); };

        typename M::template PerWarp<WarpgroupSums<M, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        // One block of the reduction is multiplied while the next one begins.
        each_block_by_warpgroups<kStages, 1>(m, tile.k_blocks, sums, load, [&](int group, int k) {
            const int stage = k % kStages * kStageBytes;
#pragma unroll
            for (int step = 0; step < kRows / 16; ++step)
                m.template multiply_warpgroup<T>(
                    sums, group,
                    Operand<Order::along_k>{stage + step * 2 * FILTERS * 16 + group * 64 * 16, FILTERS * 16, 128},
                    Operand<Order::swizzled>{stage + kWeightBytes + step * 2 * kAtoms * kAtomBytes, kAtomBytes,
                                             kAtoms * kAtomBytes});
        });
        m.sync();
        m.each_warp([&](int warp) { store_by_filter(m, warp, sums[warp], 0, kSumStride, warp * 16); });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = first_chunk + thread % kChunks, chunks = output_chunks(p);
            if (chunk < chunks) finish_chunk<T, WgmmaGemm>(m, p, thread, tile_number, chunks, chunk);
        });
    }
};

// 3x3, stride 1, CHWN, for sm_90a: a halo tile like halo_conv.h in tiles of 64 filters, multiplied by wgmma straight
// from shared memory. Each of four warpgroups takes one line of the tile: up to 16 chunks (pixels x pieces of 8
// images), which are contiguous in the halo, so that a tap is just another start of the operand.
// taps: as in halo_conv.h. Weights of a block: [tap][k / 8][filter][8 numbers along k].
template <class T, int FILTERS>
struct WgmmaHalo {
    static_assert(FILTERS == 64, "one warpgroup for each line");
    static constexpr int kBlocks = 1;  // resident per multiprocessor; bounds the registers
    static constexpr int kLines = 4, kLineChunks = 16, kThreads = kLines * 128, kStages = 3, kChannels = 16;
    static constexpr int kFilters = FILTERS, kChunks = kLines * kLineChunks;
    static constexpr int kMostHalo = 192, kPerPass = kThreads / 8;  // chunks of the halo that are copied at once
    static constexpr int kCore = 128;                               // bytes of a core matrix: 8 channels of a chunk
    static constexpr int kWeightBytes = 9 * FILTERS * kChannels * 2;
    static constexpr int kSumStride = kChunks * 8 + 8;
    static constexpr int kSumBytes = FILTERS * kSumStride * 4;
    static_assert(kSumStride % 32 == 8, "store_by_filter");

    DSP_HD static bool fits(int tile_h, int tile_w, int tile_n) {
        return tile_h <= kLines && tile_w * tile_n <= kLineChunks;
    }
    // A line is always read 16 chunks long; values behind a shorter one go into sums that are never read.
    DSP_HD static int half_bytes(int halo) { return (halo + kLineChunks) * kCore; }
    DSP_HD static int stage_bytes(int halo) { return kWeightBytes + 2 * half_bytes(halo); }
    DSP_HD static int shared_bytes(int halo) {
        return kStages * stage_bytes(halo) > kSumBytes ? kStages * stage_bytes(halo) : kSumBytes;
    }

    // Chunks of the halo that the thread copies: index in a channel's plane, or -1 outside the image.
    struct Sources {
        int unit[kMostHalo / kPerPass];
    };

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const HaloTile at = halo_tile(p, block);
        const Tile tile = p.tiles[at.filters];
        const int per_half = half_bytes(at.chunks), per_stage = stage_bytes(at.chunks);

        typename M::template PerThread<Sources> sources;
        m.each_thread([&](int thread) {
#pragma unroll
            for (int i = 0; i < kMostHalo / kPerPass; ++i)
                sources[thread].unit[i] = halo_unit(p, at, i * kPerPass + thread / 8);
        });

        const auto load = [&](int k) {
            const int stage = k % kStages * per_stage;
            m.each_thread([&](int thread) {
                copy_weights<kWeightBytes, kThreads>(m, p, tile, k, thread, stage);
                // Eight lanes write the eight channels of a chunk, 128 bytes in one piece.
                const int* channels = p.taps + tile.taps + k * kChannels + thread % 8;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = m.read(channels + half * 8);
#pragma unroll
                    for (int i = 0; i < kMostHalo / kPerPass; ++i) {
                        const int place = i * kPerPass + thread / 8, unit = sources[thread].unit[i];
                        if (place >= at.chunks) continue;
                        const bool inside = unit >= 0 && channel >= 0;
                        m.copy16(thread, stage + kWeightBytes + half * per_half + place * kCore + thread % 8 * 16,
                                 static_cast<const Vec16*>(p.x) + (inside ? channel * at.plane + unit : 0), inside);
                    }
                }
            });
        };

        typename M::template PerWarp<WarpgroupSums<M, kLineChunks>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        // With a block of the reduction in flight ptxas would make every single product wait (C7515).
        each_block_by_warpgroups<kStages, 0>(m, tile.k_blocks, sums, load, [&](int group, int k) {
            const int stage = k % kStages * per_stage, line = group < p.tile_h ? group : p.tile_h - 1;
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                const int place = ((line + tap / 3) * at.width + tap % 3) * p.tile_n;
                m.template multiply_warpgroup<T>(
                    sums, group, Operand<Order::along_k>{stage + tap * FILTERS * kChannels * 2, FILTERS * 16, 128},
                    Operand<Order::along_mn>{stage + kWeightBytes + place * kCore, per_half, kCore});
            }
        });
        m.sync();
        m.each_warp([&](int warp) {
            store_by_filter(m, warp, sums[warp], warp / 4 * kLineChunks * 8, kSumStride, warp % 4 * 16);
        });
        m.sync();
        m.each_thread([&](int thread) {
            const int chunk = thread % kChunks, line = chunk / kLineChunks, along = chunk % kLineChunks;
            if (line < p.tile_h && along < p.tile_w * p.tile_n)
                finish_pixel<T, WgmmaHalo>(m, p, at, thread, at.y0 + line, at.x0 + along / p.tile_n,
                                           at.n0 + along % p.tile_n);
        });
    }
};

}  // namespace dsp
