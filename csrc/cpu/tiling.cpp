#include "tiling.h"

#include <algorithm>
#include <functional>

namespace dsp {

double tile_cost(const Kernels& kernels, int filters, int64_t count) {
    // Two multiply-adds or two loads per cycle; three of four vector loads straddle two cache lines when
    // fewer than 16 images are interleaved. An output costs a load, a store and a few instructions.
    const double vectors = kernels.vectors[filters];
    const double arithmetic = 0.5 * filters * vectors;
    const double loads = 0.5 * (1.75 * vectors + filters);
    const double latency = 4.0; // a sum must be ready before its next term
    return (count * std::max({arithmetic, loads, latency}) + 3.0 * filters * vectors + 20.0) / vectors;
}

std::vector<int> split_filters(const Kernels& kernels, int filters, int64_t count) {
    // best[n]: least cost of n filters; last[n]: size of one tile of that choice.
    std::vector<double> best(filters + 1, 0.0);
    std::vector<int> last(filters + 1, 0);
    for (int n = 1; n <= filters; ++n)
        for (int k = 1; k <= std::min(n, kernels.filters); ++k) {
            const double cost = best[n - k] + tile_cost(kernels, k, count);
            if (last[n] == 0 || cost < best[n]) best[n] = cost, last[n] = k;
        }
    std::vector<int> sizes;
    for (int n = filters; n > 0; n -= last[n]) sizes.push_back(last[n]);
    std::sort(sizes.begin(), sizes.end(), std::greater<int>());
    return sizes;
}

} // namespace dsp
