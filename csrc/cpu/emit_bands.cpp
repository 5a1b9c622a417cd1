// The part of the builder that makes convolutions by Winograd's method over bands of rows, where that is faster.
#include <algorithm>

#include "builder.h"
#include "winograd.h"

namespace dsp {

namespace {

// Of one thread, in floats: 64 MB, about a hundred times what ResNet-50 needs. Displacements have 32 bits.
constexpr int64_t most_scratch = int64_t(1) << 24;

int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// Vectors that fit a share of a cache when `channels` of them, transformed, take this many floats each.
int fitting(int64_t bytes, int64_t channels, int64_t floats, int least, int most) {
    const int64_t fit = bytes / std::max<int64_t>(channels * floats * int64_t(sizeof(float)), 1);
    // Blocks of equal length.
    const int blocks = int((most + fit - 1) / std::max<int64_t>(fit, 1));
    return fit <= least ? std::min(least, most) : (most + blocks - 1) / blocks;
}

} // namespace

// The convolution in bands if that takes less than `least` cycles, else null.
std::unique_ptr<Op> Builder::band_conv(const ConvOp& plain, const Draft& draft, double least) {
    const Step& step = *plain.step;
    if (network_.winograd == Winograd::never || step.pairs || draft.split >= 0 || step.kernel[0] != 3 || step.dilation[0] != 1)
        return nullptr;
    std::vector<int> used, place_of(plain.x.geometry.channels, -1);
    size_t widest = 0;
    for (const auto& group : step.groups) {
        widest = std::max(widest, group.in.size());
        for (int c : group.in) place_of[c] = 0;
    }
    for (int c = 0; c < int(place_of.size()); ++c)
        if (place_of[c] == 0) place_of[c] = int(used.size()), used.push_back(c);
    if (used.empty()) return nullptr;

    const Kernels& kernels = network_.kernels;
    const Geometry& y = plain.y.geometry;
    const int64_t row = int64_t(y.w) * key_.interleave, lanes = kernels.lanes;
    const int row_vectors = int((row + lanes - 1) / lanes), tail = int(row - (row_vectors - 1) * lanes);
    const int bands = (y.h + band_rows - 1) / band_rows;
    const int sum_columns = fitting(16 << 10, int64_t(widest), band_sums * lanes, 6, row_vectors);
    // What all filters read of a band stays in the second-level cache.
    const int block_columns = fitting(128 << 10, int64_t(used.size()), band_sums * lanes, 8, row_vectors);
    const int64_t reach = int64_t(step.kernel[1] - 1) * step.dilation[1] * key_.interleave;
    BandExtent extent{0, bands, row_vectors, sum_columns, (row_vectors + block_columns - 1) / block_columns,
                      int((reach + lanes - 1) / lanes), key_.interleave >= lanes, tail < lanes};
    double cost = double(used.size()) * transform_cost(extent);
    Splits splits;
    for (const auto& group : step.groups) {
        extent.count = int64_t(group.in.size()) * step.kernel[1];
        splits.push_back(split_filters(kernels, int(group.out.size()), extent));
        for (int filters : splits.back()) cost += tile_cost(kernels, filters, extent);
    }
    if (cost >= least && network_.winograd != Winograd::always) return nullptr;

    int64_t pitch = round_up(round_up(block_columns * lanes + reach, lanes), 16);
    // Rows at a distance of a power of two would all fall into the same few sets of the cache.
    if (pitch / 16 % 2 == 0) pitch += 16;
    const int64_t channel = band_sums * pitch, size = int64_t(used.size()) * channel;
    if (size > most_scratch) return nullptr;

    auto made = std::make_unique<BandConvOp>(plain);
    BandConvOp& op = *made;
    op.used = std::move(used);
    op.row_vectors = row_vectors, op.tail = tail;
    op.sum_columns = sum_columns, op.block_columns = block_columns;
    op.transformed_pitch = pitch;
    op.zeros.assign(op.transformed_pitch, 0.0f);
    op.off.clear();
    for (const auto& group : step.groups) {
        op.off.emplace_back();
        for (int c : group.in)
            for (int tap = 0; tap < step.kernel[1]; ++tap)
                op.off.back().push_back(int32_t(place_of[c] * channel + int64_t(tap) * step.dilation[1] * key_.interleave));
    }
    op.packed = network_.packed(step, splits, true);
    std::vector<double> costs;
    for (const auto& tile : op.packed->tiles) {
        extent.count = int64_t(op.off[tile.group].size());
        costs.push_back(tile_cost(kernels, tile.filters, extent));
    }
    place_tiles(op);
    chunk_conv(op, bands, std::min(key_.parts(), bands), costs);
    op.scratch_size = size;
    op.scratch = scratch_begin_;
    scratch_floats_ = std::max(scratch_floats_, op.scratch_size * key_.threads);
    return made;
}

} // namespace dsp
