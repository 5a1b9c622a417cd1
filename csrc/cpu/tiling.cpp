#include "tiling.h"

#include <algorithm>
#include <functional>

#include "kernels/winograd.h"

namespace dsp {

namespace {

// Cycles of one term of a tile's sums.
double term_cost(double arithmetic, double loads, double ready) {
    // The lesser of the two is not quite hidden. Without this share tiles of 3 filters x 8 vectors tied with 6 x 4, which
    // reach 83 % of peak on 8x8 maps of 2 images against 66 %.
    return std::max({arithmetic, loads, ready}) + 0.5 * std::min(arithmetic, loads);
}

// Two loads per cycle; three of four vector loads straddle two cache lines when fewer images than lanes are interleaved.
double load_cost(bool aligned) { return aligned ? 1.0 : 1.75; }

} // namespace

double tile_cost(const Kernels& kernels, int filters, const Extent& extent) {
    // Two multiply-adds per cycle. A sum must be ready before its next term.
    const double load = load_cost(extent.aligned);
    double total = 0.0;
    for (int begin = 0; begin < extent.vectors; begin += extent.block)
        for (int left = std::min(extent.block, extent.vectors - begin); left > 0;) {
            const int width = pass_width(left, kernels.vectors[filters]);
            const double arithmetic = 0.5 * filters * width, loads = 0.5 * (load * width + filters);
            const double per_term = term_cost(arithmetic, loads, extent.ready);
            // An output costs a load, a store and a few instructions; a pass a call and a mispredicted loop end.
            total += extent.count * per_term + 1.5 * filters * width + 25.0;
            left -= width;
        }
    return total;
}

double tile_cost(const Kernels& kernels, int filters, const BandExtent& extent) {
    const double load = load_cost(extent.aligned);
    double total = 0.0;
    for (int begin = 0; begin < extent.columns; begin += extent.block)
        for (int left = std::min(extent.block, extent.columns - begin); left > 0;) {
            const int width = pass_width(left, kernels.vectors[filters]);
            const double arithmetic = 0.5 * filters * width, loads = 0.5 * (load * width + filters);
            // Every sum has a loop of its own and goes through memory; then each vector of pixels has an end.
            total += extent.sums * (extent.count * term_cost(arithmetic, loads, 4.0) + 1.5 * filters * width + 40.0);
            total += 2.0 * extent.outputs * filters * width + 25.0;
            if (left == width && begin + extent.block >= extent.columns && extent.partial) total += 6.0 * band_rows * filters;
            left -= width;
        }
    return extent.bands * total;
}

double transform_cost(const BandExtent& extent) {
    // Loads, sums and stores of a vector for each sum.
    const double vectors = extent.columns + double(extent.pieces) * extent.reach;
    return extent.bands * (vectors * extent.sums * 2.0 + extent.pieces * 15.0);
}

namespace {

// The split with the least total of cost(filters of a tile).
template <typename Cost>
std::vector<int> cheapest_split(int most, int filters, const Cost& cost_of) {
    std::vector<double> cost(most + 1, 0.0);
    for (int k = 1; k <= most; ++k) cost[k] = cost_of(k);
    // best[n]: least cost of n filters; last[n]: size of one tile of that choice.
    std::vector<double> best(filters + 1, 0.0);
    std::vector<int> last(filters + 1, 0);
    for (int n = 1; n <= filters; ++n)
        for (int k = 1; k <= std::min(n, most); ++k)
            if (last[n] == 0 || best[n - k] + cost[k] < best[n]) best[n] = best[n - k] + cost[k], last[n] = k;
    std::vector<int> sizes;
    for (int n = filters; n > 0; n -= last[n]) sizes.push_back(last[n]);
    std::sort(sizes.begin(), sizes.end(), std::greater<int>());
    return sizes;
}

} // namespace

std::vector<int> split_filters(const Kernels& kernels, int filters, const Extent& extent) {
    return cheapest_split(kernels.filters, filters, [&](int k) { return tile_cost(kernels, k, extent); });
}

std::vector<int> split_filters(const Kernels& kernels, int filters, const BandExtent& extent) {
    return cheapest_split(kernels.filters, filters, [&](int k) { return tile_cost(kernels, k, extent); });
}

} // namespace dsp
