// The part of the builder that makes convolutions by Winograd's method over bands of rows, where that is faster.
#include <algorithm>

#include "builder.h"
#include "kernels/winograd.h"

namespace dsp {

namespace {

// Of one thread, in floats: 64 MB, about a hundred times what ResNet-50 needs. Displacements have 32 bits.
constexpr int64_t most_scratch = int64_t(1) << 24;

// Vectors that fit a share of a cache when `channels` of them, transformed, take this many floats each.
int fitting(int64_t bytes, int64_t channels, int64_t floats, int least, int most) {
    const int64_t fit = bytes / std::max<int64_t>(channels * floats * int64_t(sizeof(float)), 1);
    // Blocks of equal length.
    const int blocks = int((most + fit - 1) / std::max<int64_t>(fit, 1));
    return fit <= least ? std::min(least, most) : (most + blocks - 1) / blocks;
}

} // namespace

// How a convolution may be computed in bands, and what that costs in cycles.
struct Builder::Banding {
    bool patches;
    BandExtent extent;
    int block_columns;
    int64_t pitch, channel, scratch; // floats
    Splits splits;
    double cost;
};

Builder::Banding Builder::banding(const ConvOp& plain, int used, bool patches) const {
    const Step& step = *plain.step;
    const Kernels& kernels = network_.kernels;
    const Geometry& y = plain.y.geometry;
    const int I = key_.interleave, lanes = kernels.lanes;
    const int64_t columns = patches ? (y.w + 1) / 2 : y.w;
    const int64_t row = columns * I;
    const int row_vectors = int((row + lanes - 1) / lanes);
    const int sums = patches ? patch_sums : band_sums;
    size_t widest = 0;
    for (const auto& group : step.groups) widest = std::max(widest, group.in.size());
    Banding made{};
    made.patches = patches;
    // What the filters of a group read stays in the first-level cache, what all filters read of a band in the second.
    const int sum_columns = fitting(16 << 10, int64_t(widest), sums * lanes, 6, row_vectors);
    made.block_columns = fitting(128 << 10, used, sums * lanes, patches ? 6 : 8, row_vectors);
    const int64_t reach = patches ? 0 : int64_t(step.kernel[1] - 1) * step.dilation[1] * I;
    made.extent = {0, sums, band_rows * (patches ? patch_columns : 1), (y.h + band_rows - 1) / band_rows, row_vectors,
                   std::min(sum_columns, made.block_columns), (row_vectors + made.block_columns - 1) / made.block_columns,
                   int((reach + lanes - 1) / lanes), I >= lanes,
                   int64_t(y.w) * I % lanes != 0};
    made.pitch = round_up(round_up(int64_t(made.block_columns) * lanes + reach, lanes), 16);
    // Rows at a distance of a power of two would all fall into the same few sets of the cache.
    if (made.pitch / 16 % 2 == 0) made.pitch += 16;
    made.channel = sums * made.pitch;
    made.scratch = used * made.channel;
    made.cost = used * transform_cost(made.extent);
    for (const auto& group : step.groups) {
        made.extent.count = int64_t(group.in.size()) * (patches ? 1 : step.kernel[1]);
        made.splits.push_back(split_filters(kernels, int(group.out.size()), made.extent));
        for (int filters : made.splits.back()) made.cost += tile_cost(kernels, filters, made.extent);
    }
    return made;
}

// The convolution in bands, or in patches of them, if that takes less than `least` cycles, else null.
std::unique_ptr<Op> Builder::band_conv(const ConvOp& plain, const Draft& draft, double least) {
    const Step& step = *plain.step;
    const Winograd allowed = network_.winograd;
    if (allowed == Winograd::never || step.pairs || draft.split >= 0 || step.kernel[0] != 3 || step.dilation[0] != 1)
        return nullptr;
    std::vector<int> used, place_of(plain.x.geometry.channels, -1);
    for (const auto& group : step.groups)
        for (int c : group.in) place_of[c] = 0;
    for (int c = 0; c < int(place_of.size()); ++c)
        if (place_of[c] == 0) place_of[c] = int(used.size()), used.push_back(c);
    if (used.empty()) return nullptr;

    std::unique_ptr<Banding> best;
    for (const bool patches : {false, true}) {
        // Pairs of columns are pixels in the same lanes only if a pixel's images fill vectors. Sorting columns for fewer
        // images was no faster than bands: ResNet-56 at I=4, 8x8 maps 156 and 152 % of peak, 16x16 127 and 126.
        const bool fits = step.kernel[1] == 3 && step.dilation[1] == 1 && key_.interleave >= network_.kernels.lanes;
        if (patches ? allowed == Winograd::bands || !fits : allowed == Winograd::patches && fits) continue;
        Banding one = banding(plain, int(used.size()), patches);
        if (one.scratch > most_scratch) continue;
        const double bound = best ? best->cost : least;
        if (one.cost < bound || (!best && allowed != Winograd::where_faster)) best = std::make_unique<Banding>(std::move(one));
    }
    if (!best) return nullptr;

    const Kernels& kernels = network_.kernels;
    const int I = key_.interleave, lanes = kernels.lanes;
    auto made = std::make_unique<BandConvOp>(plain);
    BandConvOp& op = *made;
    op.patches = best->patches;
    op.block_columns = best->block_columns, op.sum_columns = best->extent.block;
    op.pitch = best->pitch, op.channel = best->channel;
    for (int v = 0; v < best->extent.columns; ++v)
        op.at.push_back(op.patches ? v * lanes / I * 2 * I + v * lanes % I : v * lanes);
    op.zeros.assign(op.patches ? op.at.back() + 4 * I : op.pitch, 0.0f);
    op.off.clear();
    for (const auto& group : step.groups) {
        op.off.emplace_back();
        for (int c : group.in)
            for (int tap = 0; tap < (op.patches ? 1 : step.kernel[1]); ++tap)
                op.off.back().push_back(int32_t(place_of[c] * op.channel + int64_t(tap) * step.dilation[1] * I));
    }
    op.used = std::move(used);
    op.packed = network_.packed(step, best->splits, op.patches ? Form::patches : Form::bands);
    std::vector<double> costs;
    for (const auto& tile : op.packed->tiles) {
        best->extent.count = int64_t(op.off[tile.group].size());
        costs.push_back(tile_cost(kernels, tile.filters, best->extent));
    }
    place_tiles(op);
    chunk_conv(op, best->extent.bands, std::min(key_.parts(), best->extent.bands), costs);
    op.scratch_size = best->scratch;
    op.scratch = scratch_begin_;
    scratch_floats_ = std::max(scratch_floats_, op.scratch_size * key_.threads);
    return made;
}

} // namespace dsp
