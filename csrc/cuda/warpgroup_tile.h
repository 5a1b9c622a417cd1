// What the kernels for wgmma (sm_90a) share: how an operand lies in shared memory, and a warpgroup's sums.
//
// PTX ISA, "Asynchronous warpgroup level matrix instructions": an operand is made of core matrices, 8 rows of 16
// bytes; its descriptor holds a start and two strides in bytes. The three forms that are used here, for numbers of
// 16 bits, k the reduction and mn the other dimension:
//   along_k    a row: 8 numbers along k of one mn. Core matrices: `stride` apart along mn, `lead` apart along k.
//   along_mn   a row: 8 numbers along mn of one k. Core matrices: `stride` apart along mn, `lead` apart along k.
//   swizzled   a row: 64 numbers along mn of one k, 8 rows to an atom of 1,024 bytes, in which the 16-byte pieces
//              of a row are permuted by its number. Atoms: `lead` apart along mn, `stride` apart along k.
#pragma once

#include "warp_tile.h"

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

// Where a 16-byte piece lies in an atom of the swizzled form.
DSP_HD constexpr int in_atom(int k, int piece) { return k * 128 + ((piece ^ k) * 16); }

// A warpgroup's sums are 64 filters x 8 * NT positions: warp w of it holds the fragments of filters 16 w to
// 16 w + 15, which are those of mma.m16n8k16 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16").
template <class M, int NT>
using WarpgroupSums = Sums<M, 1, NT>;

// each_block (reduction.h) by warpgroups: multiply(group, k) begins the products of block k. PENDING blocks are still
// under way when the next one begins, so that many stages more are busy.
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

}  // namespace dsp
