// Shared by the kernels: the reduction of a tile block after block through a ring of stages in shared memory, a k16
// step of a warp's tile on tensor cores, and its sums through shared memory into the output. Fragment layouts of
// mma.m16n8k16: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
#pragma once

#include "conv_params.h"

namespace dsp {

// Copies `thread`'s part of the weights of one block, which are contiguous, to the beginning of its stage.
template <int BYTES, int THREADS, class M>
DSP_FN void copy_weights(M& m, const ConvParams& p, const Tile& tile, int k_block, int thread, int stage) {
    constexpr int kUnits = BYTES / 16;
    const Vec16* weights = static_cast<const Vec16*>(p.weights) + tile.weights + k_block * kUnits;
#pragma unroll
    for (int first = 0; first < kUnits; first += THREADS)
        if (first + THREADS <= kUnits || first + thread < kUnits)
            m.copy16(thread, stage + (first + thread) * 16, weights + first + thread, true);
}

// load(k) starts to copy block k into its stage while multiply() processes the blocks before it.
template <int STAGES, class M, class Load, class Multiply>
DSP_FN void each_block(M& m, int k_blocks, Load load, Multiply multiply) {
    constexpr int kAhead = STAGES - 1;
    for (int k = 0; k < kAhead; ++k) {
        if (k < k_blocks) load(k);
        m.commit();
    }
    for (int k = 0; k < k_blocks; ++k) {
        m.template wait<kAhead - 1>();
        m.sync();
        if (k + kAhead < k_blocks) load(k + kAhead);
        m.commit();
        multiply(k);
    }
    m.template wait<0>();
}

// MT * 16 filters by NT * 8 positions.
template <class M, int MT, int NT>
struct Sums {
    typename M::Acc at[MT][NT];
};

// A step's weights are stored as fragments: [m tile][lane][8 values], so a lane reads 16 bytes.
template <int MT>
DSP_HD int fragment_offset(int step, int m, int lane) {
    return ((step * MT + m) * 32 + lane) * 16;
}

// The fragments `a` of one step times its positions. at(pair of n tiles, lane): the shared address of that lane's row
// of eight values, for ldmatrix.x4: lanes 0-7 and 8-15 the k halves of the first n tile, 16-23 and 24-31 those of the
// second.
template <class T, bool TRANSPOSED, class M, int MT, int NT, class Address>
DSP_FN void multiply_fragments(M& m, int warp, Sums<M, MT, NT>& sums, const typename M::Quad (&a)[MT], Address at) {
#pragma unroll
    for (int j = 0; j < NT / 2; ++j) {
        typename M::Quad b;
        m.template load_matrices<TRANSPOSED>(warp, b, [&](int lane) { return at(j, lane); });
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            m.template multiply<T>(sums.at[i][2 * j], a[i], b, 0);
            m.template multiply<T>(sums.at[i][2 * j + 1], a[i], b, 2);
        }
    }
}

// The same with the fragments of step number `step` in shared memory from `weights` on.
template <class T, bool TRANSPOSED, class M, int MT, int NT, class Address>
DSP_FN void multiply_step(M& m, int warp, Sums<M, MT, NT>& sums, int weights, int step, Address at) {
    typename M::Quad a[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i)
        m.load_fragment(warp, a[i], [&](int lane) { return weights + fragment_offset<MT>(step, i, lane); });
    multiply_fragments<T, TRANSPOSED>(m, warp, sums, a, at);
}

template <class M, int MT, int NT>
DSP_FN void clear(Sums<M, MT, NT>& sums) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) M::clear(sums.at[i][j]);
}

// Stores sums as float [filter][position], rows of `stride` floats; stride % 32 == 8 avoids bank conflicts.
template <class M, int MT, int NT>
DSP_FN void store_by_filter(M& m, int warp, Sums<M, MT, NT>& sums, int first_position, int stride,
                            int first_filter = 0) {
    m.each_lane(warp, [&](int lane) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int filter = first_filter + i * 16 + half * 8 + lane / 4;
                    const int position = first_position + j * 8 + lane % 4 * 2;
                    m.store_two(warp * 32 + lane, (filter * stride + position) * 4,
                                M::get(sums.at[i][j], 2 * half, lane), M::get(sums.at[i][j], 2 * half + 1, lane));
                }
    });
}

// The same as [position][filter]; stride % 16 == 4 avoids bank conflicts.
template <class M, int MT, int NT>
DSP_FN void store_by_position(M& m, int warp, Sums<M, MT, NT>& sums, int first_position, int stride) {
    m.each_lane(warp, [&](int lane) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int filter = i * 16 + e / 2 * 8 + lane / 4;
                    const int position = first_position + j * 8 + lane % 4 * 2 + e % 2;
                    m.store_one(warp * 32 + lane, (position * stride + filter) * 4, M::get(sums.at[i][j], e, lane));
                }
    });
}

// Eight neighbouring sums. Half of a quarter warp reads its upper four first, so that eight lanes with 32 bytes each
// use every bank once per access.
template <class M>
DSP_FN void load_eight(M& m, int thread, int offset, bool swapped, float (&value)[8]) {
    const int toggle = swapped ? 16 : 0;
    float first[4], second[4];
    m.load_four(thread, offset + toggle, first);
    m.load_four(thread, offset + (16 - toggle), second);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        value[i] = swapped ? second[i] : first[i];
        value[4 + i] = swapped ? first[i] : second[i];
    }
}

// Bias, residual and activation of eight sums that are adjacent in memory, and their one store.
template <class T, class M>
DSP_FN void finish_eight(M& m, const ConvParams& p, float (&value)[8], const float (&bias)[8], int64_t unit) {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] += bias[i];
    if (p.residual) add_eight<T>(value, m.read_residual(static_cast<const Vec16*>(p.residual) + unit));
    activate(value, p.activation);
    m.write(static_cast<Vec16*>(p.out) + unit, narrow_eight<T>(value));
}

// CHWN: the sums of store_by_filter at chunk `thread` % K::kChunks of 8 images, filters from `thread` / K::kChunks on.
// plane: chunks of an output channel; unit: which of them it is.
template <class T, class K, class M>
DSP_FN void finish_chunk(M& m, const ConvParams& p, int thread, int tile_number, int plane, int unit) {
    const int chunk = thread % K::kChunks;
#pragma unroll
    for (int filter = thread / K::kChunks; filter < K::kFilters; filter += K::kThreads / K::kChunks) {
        const int row = tile_number * K::kFilters + filter;
        const int channel = m.read(p.rows + row);
        if (channel < 0) continue;
        float value[8], bias[8];
        load_eight(m, thread, (filter * K::kSumStride + chunk * 8) * 4, chunk & 4, value);
        const float b = m.read(p.bias + row);
#pragma unroll
        for (int i = 0; i < 8; ++i) bias[i] = b;
        finish_eight<T>(m, p, value, bias, static_cast<int64_t>(channel) * plane + unit);
    }
}

}  // namespace dsp
