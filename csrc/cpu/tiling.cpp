#include "tiling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <tuple>

#include "kernels/winograd.h"

namespace dsp {

namespace {

// -- Estimated cycles --

// What the filters of a group are computed over.
struct Extent {
    int64_t count;            // products per sum
    int vectors;              // of sums: in one chunk, or in a row of a band
    int block;                // vectors that all filters process before the next
    bool aligned;             // vector loads never straddle two cache lines
    double add_latency = 4.0; // cycles until a sum can take its next term
    // By Winograd's method:
    int sums = 1;    // of a vector
    int outputs = 0; // vectors of pixels computed from them
    int bands = 1;
    int pieces = 1;       // of a row that are transformed one after the other
    int reach = 0;        // vectors that a piece reads beyond its own
    bool partial = false; // a row's last vector has lanes that are not pixels
    int copies = 1;       // of a channel's transformed rows: stacked, one for each horizontal tap
};

// Calls visit(width, whether it is the last) for every pass of a tile of `filters` filters over `vectors` vectors in
// blocks.
template <typename Visit>
void each_pass(const Kernels& kernels, int filters, int vectors, int block, const Visit& visit) {
    for (int begin = 0; begin < vectors; begin += block)
        for (int left = std::min(block, vectors - begin); left > 0;) {
            const int width = pass_width(left, kernels.vectors[filters]);
            left -= width;
            visit(width, left == 0 && begin + block >= vectors);
        }
}

// Cycles of one term of a tile's sums: two multiply-adds and two loads per cycle; three of four vector loads straddle
// two cache lines when fewer images than lanes are interleaved.
double bound_cost(int filters, int width, bool aligned, double add_latency) {
    const double load = aligned ? 1.0 : 1.75;
    return std::max({0.5 * filters * width, 0.5 * (load * width + filters), add_latency});
}

double pass_cost(int filters, int width, bool aligned, double add_latency) {
    const double load = aligned ? 1.0 : 1.75;
    // The smaller of the two is not fully hidden. Without this share tiles of 3 filters x 8 vectors tied with 6 x 4,
    // which reach 83 % of peak on 8x8 maps of 2 images against 66 %.
    const double hidden = std::min(0.5 * filters * width, 0.5 * (load * width + filters));
    return bound_cost(filters, width, aligned, add_latency) + 0.5 * hidden;
}

double tile_cost(const Kernels& kernels, int filters, const Extent& extent) {
    double total = 0.0;
    each_pass(kernels, filters, extent.vectors, extent.block, [&](int width, bool last) {
        // A sum costs a load, a store and a few instructions; a pass a call and a mispredicted loop end. If there are
        // several, each has its own loop and goes through memory; then each vector of pixels has an epilogue.
        const double sum = extent.count * pass_cost(filters, width, extent.aligned, extent.add_latency);
        total += extent.sums * (sum + 1.5 * filters * width + (extent.sums > 1 ? 40.0 : 0.0));
        total += 2.0 * extent.outputs * filters * width + 25.0;
        if (last && extent.partial) total += 6.0 * band_rows * filters;
    });
    return extent.bands * total;
}

// Of the transforms of one channel: loads, sums and stores of a vector for each sum.
double transform_cost(const Extent& extent) {
    const double vectors = extent.vectors + double(extent.pieces) * extent.reach;
    return extent.bands * extent.copies * (vectors * extent.sums * 2.0 + extent.pieces * 15.0);
}

// Sizes of the filter tiles of a group, the largest first, with the least estimated time.
std::vector<int> split_filters(const Kernels& kernels, int filters, const Extent& extent) {
    const int most = kernels.filters;
    std::vector<double> cost(most + 1, 0.0);
    for (int k = 1; k <= most; ++k) cost[k] = tile_cost(kernels, k, extent);
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

// -- Tiles and chunks --

class Tiler {
  public:
    Tiler(const Network& network, const PlanKey& key) : network_(network), key_(key), kernels_(network.kernels) {}

    void plain(Conv& op) const {
        const int vectors = int(op.vectors.at.size()), pieces = std::max(1, std::min(key_.parts(), vectors / 12));
        const auto extent_of = [&](size_t g) { return extent(op, g, pieces); };
        op.packed = network_.packed(op.step, split(op.step, extent_of).first);
        finish(op, vectors, pieces, key_.parts(),
               [&](const FilterTile& tile) { return tile_cost(kernels_, tile.filters, extent_of(tile.group)); });
    }

    // By products of matrices: terms in the order of pack_matrices().
    void matrices(MatrixConv& op, int64_t scratch_begin) const {
        const size_t taps = size_t(op.step.kernel[0]) * op.step.kernel[1];
        const auto whole = [&](int64_t at) { return at % kernels_.lanes == 0; };
        bool fits = std::all_of(op.vectors.at.begin(), op.vectors.at.end(), whole); // in place
        Splits splits;
        double gathering = 0.0, in_place = 0.0; // cycles for a vector
        for (size_t g = 0; g < op.off.size(); ++g) {
            const int filters = int(op.step.groups[g].out.size());
            splits.emplace_back();
            for (int left = filters; left > 0; left -= matrix_filters)
                splits.back().push_back(std::min(left, matrix_filters));
            const auto before = std::move(op.off[g]);
            auto& off = op.off[g] = {};
            for (size_t tap = 0; tap < taps; ++tap)
                for (size_t i = tap; i < before.size(); i += taps) off.push_back(before[i]);
            const size_t words = off.size() / taps;
            const int step = words > 1 ? off[1] - off[0] : kernels_.lanes;
            op.row_step.push_back(step);
            // A channel that is read twice has distance 0, which means gathered.
            fits = fits && step != 0 && whole(step) && (words < 16 || words % 16 == 0);
            for (size_t i = 0; i < off.size() && fits; ++i)
                fits = whole(off[i]) && (i % words == 0 || off[i] - off[i - 1] == step);
            const double products = 16.0 * ((filters + 15) / 16); // of matrices with a vector of the rows of a matrix
            gathering += std::max(6.5 * double(off.size()), products * double((off.size() + 15) / 16));
            in_place += products * double(taps * ((words + 15) / 16));
        }
        const Form form = fits && in_place < gathering ? Form::matrices_in_place : Form::matrices;
        int most = 0; // matrices that are gathered
        for (size_t g = 0; g < op.off.size(); ++g) {
            const int count = int(op.off[g].size()), height = matrix_height(int64_t(count / taps), form);
            op.height.push_back(height), op.matrices.push_back((count + height - 1) / height);
            if (form == Form::matrices) op.row_step[g] = 0, most = std::max(most, op.matrices[g]);
        }
        op.packed = network_.packed(op.step, splits, form);
        op.scratch = scratch_begin;
        op.scratch_size = int64_t(2) * most * matrix_vectors * 16 * kernels_.lanes;
        const int vectors = int(op.vectors.at.size());
        finish(op, vectors, std::max(1, std::min(key_.parts(), (vectors + 1) / matrix_vectors)), key_.parts(),
               [&](const FilterTile& tile) { return double(op.matrices[tile.group]) * ((tile.filters + 15) / 16); });
    }

    // Estimated cycles of the plain sum on one thread.
    double plain_cost(const Conv& op) const {
        return split(op.step, [&](size_t g) { return extent(op, g, 1); }).second;
    }

    // Vectors and reduction terms of one pass. Between passes the sums go through memory, which costs about a tenth
    // of a pass of 40 terms. A window of several taps reads each line of the input often, so its passes keep to the
    // first-level cache: ResNet-20's 8x8 layers 87 % of peak, 73 % without passes. A 1x1 convolution reads a line
    // once per filter tile and would have short passes there, so it keeps to the second level: ResNet-50 at batch 1
    // 15.5 ms, 16.6 ms with passes of 32 KB.
    void block(Conv& op, int64_t rows) const {
        const int64_t taps = int64_t(op.step.kernel[0]) * op.step.kernel[1];
        const int64_t cache = taps > 1 ? 32 << 10 : 256 << 10;
        const int64_t vector = kernels_.lanes * int64_t(sizeof(float));
        int64_t widest = 0;
        for (const auto& off : op.off) widest = std::max(widest, int64_t(off.size()) / taps);
        // Multiples of most widths of a microtile. On a Zen 1 CPU with vectors of 8, the 1x1 convolutions of ResNet-50
        // 80 % on 56x56 reach 56 % of peak with blocks of 12 and 44 % with 24, on 14x14 66 % and 63 %.
        const bool narrow = taps == 1 && kernels_.lanes <= 8;
        const int block = narrow || (taps > 1 && widest * 24 * vector * rows > cache) ? 12 : 24;
        // No short block at the end: it would fill no microtile.
        const int vectors = int(op.vectors.at.size()), rest = vectors % block;
        const int blocks = (vectors + block - 1) / block;
        op.block_vectors = rest && rest * 4 <= block ? (vectors + blocks - 1) / blocks : block;
        const int64_t channels = std::max<int64_t>(cache / (op.block_vectors * vector * rows), 1);
        const auto& end = op.step.requantize;
        const int64_t most = end && !op.step.words && !end->exact ? exact_terms : std::numeric_limits<int>::max();
        for (const auto& off : op.off) {
            // Equal passes, not one short one at the end.
            const int64_t total = int64_t(off.size()) / taps;
            const int64_t passes = std::max<int64_t>((total + channels - 1) / channels, 1);
            op.block_terms.push_back(int(std::clamp<int64_t>((total + passes - 1) / passes * taps, 1, most)));
        }
    }

    std::unique_ptr<BandConv> in_bands(const Conv& plain, double plain_cost, int64_t scratch_begin) const;

  private:
    const Network& network_;
    const PlanKey& key_;
    const Kernels& kernels_;

    // A convolution by Winograd's method, and its estimated cycles.
    struct Banding {
        Winograd form;
        Extent extent;
        int block_columns;
        int64_t pitch, channel, tap, scratch; // floats
        Splits splits;
        double cost;
        Extent of_group(const Step& step, size_t g) const {
            Extent one = extent;
            one.count = int64_t(step.groups[g].in.size()) * (form == Winograd::patches ? 1 : step.kernel[1]);
            return one;
        }
    };
    Banding banding(const Conv& plain, int used, Winograd form) const;

    Extent extent(const Conv& op, size_t group, int pieces) const {
        const int vectors = int(op.vectors.at.size());
        return {int64_t(op.off[group].size()), (vectors + pieces - 1) / pieces, op.block_vectors,
                key_.interleave >= kernels_.lanes, op.step.words ? op.step.words->add_latency : 4.0};
    }

    // The filter tiles of all groups, and their estimated cycles.
    template <typename ExtentOf>
    std::pair<Splits, double> split(const Step& step, const ExtentOf& extent_of) const {
        std::pair<Splits, double> made{{}, 0.0};
        for (size_t g = 0; g < step.groups.size(); ++g) {
            const Extent extent = extent_of(g);
            made.first.push_back(split_filters(kernels_, int(step.groups[g].out.size()), extent));
            for (int filters : made.first.back()) made.second += tile_cost(kernels_, filters, extent);
        }
        return made;
    }

    // Places the tiles and cuts chunks of about equal work: ranges of units (vectors or bands) where there are many,
    // otherwise ranges of filter tiles.
    template <typename CostOf>
    void finish(Conv& op, int units, int by_units, int parts, const CostOf& cost_of) const {
        std::vector<double> cost{0.0}; // of the tiles before each
        for (const auto& tile : op.packed->tiles) {
            cost.push_back(cost.back() + cost_of(tile));
            op.tile_begin.push_back(int(op.tile_planes.size()));
            for (int c : tile.channels) op.tile_planes.push_back(c * op.y.geometry.plane);
            for (int c : tile.channels) op.tile_planes.push_back(op.add ? op.add->planes[c] : 0);
        }
        const int tiles = int(op.packed->tiles.size());
        const int absent = op.skip_absent ? 0 : int(op.step.absent.size());
        const int by_tiles = std::max(1, std::min(tiles, (parts + by_units - 1) / by_units));
        std::vector<int> border{0};
        for (int part = 1; part < by_tiles; ++part) {
            const double target = cost[tiles] * part / by_tiles;
            int t = border.back();
            while (t < tiles && (cost[t] + cost[t + 1]) / 2 < target) ++t;
            border.push_back(t);
        }
        border.push_back(tiles);
        const int pieces = by_units * by_tiles;
        for (int u = 0; u < by_units; ++u)
            for (int t = 0; t < by_tiles; ++t) {
                const Range range = cut(units, by_units, u), rest = cut(absent, pieces, u * by_tiles + t);
                op.parts.push_back({range.first, range.last, border[t], border[t + 1], rest.first, rest.last});
            }
    }
};

// -- Winograd's method --

// Limit of one thread's scratch, in floats: 64 MB, about a hundred times what ResNet-50 needs. Displacements have 32
// bits.
constexpr int64_t most_scratch = int64_t(1) << 24;

// Vectors that fit into `bytes` of cache when each of `channels` takes this many floats per vector; equal blocks.
int fitting(int64_t bytes, int64_t channels, int64_t floats, int least, int most) {
    const int64_t fit = bytes / std::max<int64_t>(channels * floats * int64_t(sizeof(float)), 1);
    const int blocks = int((most + fit - 1) / std::max<int64_t>(fit, 1));
    return fit <= least ? std::min(least, most) : (most + blocks - 1) / blocks;
}

Tiler::Banding Tiler::banding(const Conv& plain, int used, Winograd form) const {
    const Step& step = plain.step;
    const Geometry& y = plain.y.geometry;
    const int I = key_.interleave, lanes = kernels_.lanes;
    const bool patches = form == Winograd::patches, stacked = form == Winograd::stacked;
    const int64_t columns = patches ? (y.w + 1) / 2 : y.w;
    const int bands = (y.h + band_rows - 1) / band_rows, copies = stacked ? step.kernel[1] : 1;
    const int row_vectors = stacked ? (bands + 1) / 2 : int((columns * I + lanes - 1) / lanes);
    const int sums = patches ? patch_sums : band_sums;
    size_t widest = 0;
    for (const auto& group : step.groups) widest = std::max(widest, group.in.size());
    Banding made{};
    made.form = form;
    // What the filters of a group read stays in the first-level cache, what all filters read of a band in the second.
    const int sum_columns = fitting(16 << 10, int64_t(widest), sums * lanes * copies, 6, row_vectors);
    made.block_columns = fitting(128 << 10, used, sums * lanes * copies, patches ? 6 : 8, row_vectors);
    const int64_t reach = patches || stacked ? 0 : int64_t(step.kernel[1] - 1) * step.dilation[1] * I;
    made.extent = {0, row_vectors, std::min(sum_columns, made.block_columns), stacked || I >= lanes};
    made.extent.sums = sums;
    made.extent.outputs = band_rows * (patches ? patch_columns : 1);
    made.extent.bands = stacked ? 1 : bands;
    made.extent.copies = copies;
    made.extent.pieces = (row_vectors + made.block_columns - 1) / made.block_columns;
    made.extent.reach = int((reach + lanes - 1) / lanes);
    made.extent.partial = stacked || int64_t(y.w) * I % lanes != 0;
    made.tap = stacked ? int64_t(made.block_columns) * lanes : int64_t(step.dilation[1]) * I;
    // Stacked, what one sum reads is adjacent.
    const int64_t floats = stacked ? used * copies * made.tap : int64_t(made.block_columns) * lanes + reach;
    made.pitch = round_up(round_up(floats, lanes), 16);
    // Rows at a distance of a power of two would all fall into the same few sets of the cache.
    if (made.pitch / 16 % 2 == 0) made.pitch += 16;
    made.channel = stacked ? copies * made.tap : sums * made.pitch;
    made.scratch = stacked ? sums * made.pitch : used * made.channel;
    std::tie(made.splits, made.cost) = split(step, [&](size_t g) { return made.of_group(step, g); });
    made.cost += used * transform_cost(made.extent);
    return made;
}

// The convolution by Winograd's method if that is faster than plain_cost cycles, otherwise null.
std::unique_ptr<BandConv> Tiler::in_bands(const Conv& plain, double plain_cost, int64_t scratch_begin) const {
    const Step& step = plain.step;
    const Winograd allowed = network_.winograd;
    std::vector<int> used, place_of(plain.x.geometry.channels, -1);
    for (const auto& group : step.groups)
        for (int c : group.in) place_of[c] = 0;
    for (int c = 0; c < int(place_of.size()); ++c)
        if (place_of[c] == 0) place_of[c] = int(used.size()), used.push_back(c);
    if (used.empty()) return nullptr;

    std::unique_ptr<Banding> best;
    const auto fits = [&](Winograd form) {
        // Pairs of columns are pixels in the same lanes only if a pixel's images fill vectors. Sorting columns for
        // fewer images was no faster than bands: ResNet-56 at I=4, 8x8 maps 156 and 152 % of peak, 16x16 127 and 126.
        if (form == Winograd::patches)
            return step.kernel[1] == 3 && step.dilation[1] == 1 && key_.interleave >= kernels_.lanes;
        const int reach = (step.kernel[1] - 1) * step.dilation[1];
        return form != Winograd::stacked ||
               2 * key_.interleave * std::max(plain.y.geometry.w, reach) <= kernels_.lanes;
    };
    const Winograd forced = fits(allowed) ? allowed : Winograd::bands;
    for (const Winograd form : {Winograd::bands, Winograd::patches, Winograd::stacked}) {
        if (!fits(form) || (allowed != Winograd::where_faster && form != forced)) continue;
        Banding one = banding(plain, int(used.size()), form);
        if (one.scratch > most_scratch) continue;
        const double bound = best ? best->cost : plain_cost;
        if (one.cost < bound || (!best && allowed != Winograd::where_faster))
            best = std::make_unique<Banding>(std::move(one));
    }
    if (!best) return nullptr;

    const int I = key_.interleave, lanes = kernels_.lanes;
    auto op = std::make_unique<BandConv>(plain, best->form);
    op->block_columns = best->block_columns, op->sum_columns = best->extent.block;
    op->pitch = best->pitch, op->channel = best->channel, op->tap = best->tap;
    for (int v = 0; v < best->extent.vectors; ++v)
        op->at.push_back(op->patches ? v * lanes / I * 2 * I + v * lanes % I : op->stacked ? 0 : v * lanes);
    // Also of the taps of stacked bands, and of a vector before them.
    op->zeros.assign(lanes + std::max<int64_t>(op->patches ? op->at.back() + 4 * I : op->pitch,
                                               step.kernel[1] * step.dilation[1] * I + lanes),
                     0.0f);
    op->off.clear();
    for (const auto& group : step.groups) {
        op->off.emplace_back();
        for (int c : group.in)
            for (int tap = 0; tap < (op->patches ? 1 : step.kernel[1]); ++tap)
                op->off.back().push_back(int32_t(place_of[c] * op->channel + tap * op->tap));
    }
    op->used = std::move(used);
    op->packed = network_.packed(step, best->splits, op->patches ? Form::patches : Form::bands);
    op->scratch = scratch_begin, op->scratch_size = best->scratch;
    // Each part of stacked bands transforms the whole input.
    finish(*op, best->extent.bands, std::min(key_.parts(), best->extent.bands),
           op->stacked ? key_.threads : key_.parts(),
           [&](const FilterTile& tile) { return tile_cost(kernels_, tile.filters, best->of_group(step, tile.group)); });
    return op;
}

// -- Counted work --

// Of a part of a plain sum.
void count_sums(Work& work, const Conv& op, const Conv::Part& part) {
    const bool aligned = op.y.geometry.interleave >= op.kernels.lanes;
    const double latency = op.step.words ? op.step.words->add_latency : 4.0;
    for (int t = part.first_tile; t < part.last_tile; ++t) {
        const FilterTile& tile = op.packed->tiles[t];
        const double count = double(op.off[tile.group].size());
        const double passes = std::max(1.0, std::ceil(count / op.block_terms[tile.group]));
        each_pass(op.kernels, tile.filters, part.last_vector - part.first_vector, op.block_vectors, [&](int P, bool) {
            work[Count::bound] += count * bound_cost(tile.filters, P, aligned, latency);
            work[Count::passes] += passes;
            work[Count::sums] += passes * tile.filters * P;
        });
        work[Count::held] += tile.filters * count;
    }
}

void count_sums(Work& work, const MatrixConv& op, const Conv::Part& part) {
    const double vectors = part.last_vector - part.first_vector;
    for (int t = part.first_tile; t < part.last_tile; ++t) {
        const FilterTile& tile = op.packed->tiles[t];
        const double products = double(op.matrices[tile.group]) * ((tile.filters + 15) / 16);
        work[Count::bound] += 16.0 * vectors * products;
        work[Count::passes] += vectors / matrix_vectors;
        work[Count::sums] += vectors * tile.filters;
        work[Count::held] += 256.0 * products;
    }
}

// Of a part of a sum by Winograd's method.
void count_sums(Work& work, const BandConv& op, const Conv::Part& part) {
    const int sums = op.patches ? patch_sums : band_sums, row_vectors = int(op.at.size()), I = op.y.geometry.interleave;
    const double bands = part.last_vector - part.first_vector, outputs = op.patches ? patch_columns : 1;
    for (int t = part.first_tile; t < part.last_tile; ++t) {
        const FilterTile& tile = op.packed->tiles[t];
        const double count = double(op.off[tile.group].size());
        for (int block = 0; block < row_vectors; block += op.block_columns)
            each_pass(op.kernels, tile.filters, std::min(op.block_columns, row_vectors - block), op.sum_columns,
                      [&](int P, bool) {
                          work[Count::band_bound] +=
                              bands * sums * count * bound_cost(tile.filters, P, I >= op.kernels.lanes, 4.0);
                          work[Count::band_sums] += bands * sums * tile.filters * P;
                          work[Count::band_outputs] += bands * band_rows * outputs * tile.filters * P;
                      });
        if (op.y.geometry.w * I % op.kernels.lanes) work[Count::band_edges] += bands * band_rows * tile.filters;
        work[Count::held] += sums * tile.filters * count;
    }
    const double channel_bands = bands * double(op.used.size());
    const double reach = op.patches ? 0 : double(op.step.kernel[1] - 1) * op.step.dilation[1] * I / op.kernels.lanes;
    const int blocks = (row_vectors + op.block_columns - 1) / op.block_columns;
    work[op.patches ? Count::patch_transforms : Count::transforms] +=
        channel_bands * sums * (row_vectors + blocks * std::ceil(reach));
    work[Count::rows] += channel_bands * blocks;
}

// Of the maps that a part reads and writes.
void count_maps(Work& work, const Conv& op, const Conv::Part& part) {
    std::set<int> read;
    double written = 0.0;
    for (int t = part.first_tile; t < part.last_tile; ++t) {
        const auto& in = op.step.groups[op.packed->tiles[t].group].in;
        read.insert(in.begin(), in.end());
        written += op.packed->tiles[t].filters;
    }
    const int64_t units = op.parts.back().last_vector; // vectors or bands
    const double own = double(part.last_vector - part.first_vector) / units;
    const double pixels = double(op.vectors.count()) * op.kernels.lanes * own;
    const double absent = part.last_absent - part.first_absent;
    work[Count::traffic] += pixels * (double(read.size()) + (op.add ? 2.0 : 1.0) * written);
    work[Count::mapped] += absent * double(op.vectors.count()) * (op.add ? 2.0 : 1.0);
    if (op.in_place) return;
    work[Count::fresh] += pixels * written;
    work[Count::cleared] += absent + (part.first_vector == 0 ? written : 0.0);
}

} // namespace

Op tile_conv(const Network& network, const PlanKey& key, std::unique_ptr<Conv> conv, int rows, bool is_split,
             int64_t scratch_begin, int64_t& scratch_floats) {
    const auto operation = [&](const char* name, auto made) {
        const int parts = int(made->parts.size());
        const bool by_matrices = made->step.matrices;
        std::set<int, std::greater<int>> sizes;
        for (const FilterTile& tile : made->packed->tiles) sizes.insert(tile.filters);
        const auto shared = std::shared_ptr(std::move(made));
        const auto run = [made = shared](int first, int last, const Context& context) {
            for (int part = first; part < last; ++part) made->run(made->parts[part], context);
        };
        Op op{name, parts, run};
        op.work = [made = shared](int first, int last) {
            Work work;
            for (int part = first; part < last; ++part) {
                count_sums(work, *made, made->parts[part]);
                count_maps(work, *made, made->parts[part]);
            }
            return work;
        };
        for (int filters : sizes)
            op.detail += (op.detail.empty() ? " in tiles of " : ", ") + std::to_string(filters) + "x" +
                         std::to_string(by_matrices ? matrix_vectors : network.kernels.vectors[filters]);
        return op;
    };
    const Tiler tiler(network, key);
    const Step& step = conv->step;
    if (step.matrices) {
        auto made = std::make_unique<MatrixConv>(std::move(*conv));
        tiler.matrices(*made, scratch_begin);
        scratch_floats = std::max(scratch_floats, made->scratch_size * key.threads);
        const bool in_place = !made->row_step.empty() && made->row_step[0];
        return operation(in_place ? "conv by matrices in place" : "conv by matrices", std::move(made));
    }
    tiler.block(*conv, rows);
    if (network.winograd != Winograd::never && !step.words && !step.requantize && !is_split && step.kernel[0] == 3 &&
        step.dilation[0] == 1) {
        // The choice must not depend on the number of threads: their results are bitwise equal.
        if (auto in_bands = tiler.in_bands(*conv, tiler.plain_cost(*conv), scratch_begin)) {
            scratch_floats = std::max(scratch_floats, in_bands->scratch_size * key.threads);
            const char* const name = in_bands->patches   ? "conv in patches"
                                     : in_bands->stacked ? "conv in stacked bands"
                                                         : "conv in bands";
            return operation(name, std::move(in_bands));
        }
    }
    tiler.plain(*conv);
    if (step.requantize) {
        size_t filters = 0; // of groups whose sums pass through memory
        for (size_t g = 0; g < step.groups.size(); ++g)
            if (conv->off[g].size() > size_t(conv->block_terms[g]))
                filters = std::max(filters, step.groups[g].out.size());
        conv->scratch = scratch_begin;
        conv->scratch_size = round_up(int64_t(filters) * conv->block_vectors * network.kernels.lanes, 16);
        scratch_floats = std::max(scratch_floats, conv->scratch_size * key.threads);
    }
    return operation("conv", std::move(conv));
}

} // namespace dsp
