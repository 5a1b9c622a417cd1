// The way of a tile's reduction through shared memory: block after block in a ring of stages.
#pragma once

#include "conv_params.h"

namespace dsp {

// What `thread` copies of the weights of one block, which lie in one piece, to the beginning of its stage.
template <int BYTES, int THREADS, class M>
DSP_FN void copy_weights(M& m, const ConvParams& p, const Tile& tile, int k_block, int thread, int stage) {
    constexpr int kUnits = BYTES / 16;
    const Vec16* weights = static_cast<const Vec16*>(p.weights) + tile.weights + k_block * kUnits;
#pragma unroll
    for (int first = 0; first < kUnits; first += THREADS)
        if (first + THREADS <= kUnits || first + thread < kUnits)
            m.copy16(thread, stage + (first + thread) * 16, weights + first + thread, true);
}

// load(k) begins to copy block k into its stage, while blocks before it are multiplied by multiply(k).
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

}  // namespace dsp
