// How the filters of a group are divided among microtiles.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"

namespace dsp {

// Sizes of the filter tiles of a group, the largest first, with the least estimated time.
// count: products per output.
std::vector<int> split_filters(const Kernels& kernels, int filters, int64_t count);

// Estimated cycles of one tile of `filters` for one output vector each.
double tile_cost(const Kernels& kernels, int filters, int64_t count);

} // namespace dsp
