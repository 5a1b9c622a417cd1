// How a convolution is computed: as a plain sum or by Winograd's method, cut into microtiles and into chunks.
#pragma once

#include "ops.h"

namespace dsp {

// The operation of a convolution that has its places and displacements; by Winograd's method where that is faster.
// rows: distinct input rows of the window. is_split: whether the input is split by phase. Scratch begins at
// scratch_begin in the arena; scratch_floats becomes the largest size needed.
Op tile_conv(const Network& network, const PlanKey& key, std::unique_ptr<Conv> conv, int rows, bool is_split,
             int64_t scratch_begin, int64_t& scratch_floats);

// Vectors of the next pass when `left` remain and at most `most` fit: passes of equal width.
inline int pass_width(int left, int most) {
    const int passes = (left + most - 1) / most;
    return (left + passes - 1) / passes;
}

} // namespace dsp
