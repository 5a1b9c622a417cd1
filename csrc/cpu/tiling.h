// How the work of a group is divided among microtiles.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel.h"

namespace dsp {

// What a group's filters are computed over.
struct Extent {
    int64_t count; // products per output
    int vectors;   // in one piece of work
    int block;     // vectors that all filters pass over before the next
    bool aligned;  // vector loads never straddle two cache lines
    double ready;  // cycles until a sum can take its next term
};

// Estimated cycles of one tile of `filters` over the extent.
double tile_cost(const Kernels& kernels, int filters, const Extent& extent);

// What a group's filters are computed over by Winograd's method.
struct BandExtent {
    int64_t count; // products per sum
    int sums;      // of a vector
    int outputs;   // vectors of pixels that they make
    int bands;
    int columns;   // vectors of sums in a row
    int block;     // vectors that all filters pass over before the next
    int pieces;    // of a row that are transformed one after the other
    int reach;     // vectors that a piece reads beyond its own
    bool aligned;
    bool partial;  // a row's last vector has lanes that are no pixels
};

// Estimated cycles of one tile over all bands.
double tile_cost(const Kernels& kernels, int filters, const BandExtent& extent);

// Estimated cycles of the transforms of one channel.
double transform_cost(const BandExtent& extent);

// Sizes of the filter tiles of a group, the largest first, with the least estimated time.
std::vector<int> split_filters(const Kernels& kernels, int filters, const Extent& extent);
std::vector<int> split_filters(const Kernels& kernels, int filters, const BandExtent& extent);

// Vectors of the next pass when `left` remain and at most `most` fit: passes of equal width.
inline int pass_width(int left, int most) {
    const int passes = (left + most - 1) / most;
    return (left + passes - 1) / passes;
}

} // namespace dsp
