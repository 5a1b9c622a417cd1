// The operations of a plan, with all displacements precomputed.
#pragma once

#include <optional>

#include "plan.h"

namespace dsp {

// NCHW (any strides) into the planar layout. used: per channel; the pixels of others are never read.
Op load(Place to, int number, std::vector<char> used);

// The planar layout into a caller's tensor (any strides).
Op store(Place from, int number);

// Rows and columns sorted by their phase under a stride: the plane of a phase and channel holds
// x[channel, phase + stride * i]; with words, of several channels.
using Phase = std::pair<Pair, Source>; // row and column phase
Op split(const Kernels& kernels, Place from, Place to, Pair stride, const WordKernels* words,
         std::vector<std::pair<Phase, int>> planes);

// act(x * scale + shift + b), or of a product act(x * b), where b may be a single pixel.
Op map(const Kernels& kernels, const Step& step, Place x, std::optional<Place> b, Place y);

// Pools whose pads may count as zeros: by displacements on an input split by phase.
Op fast_pool(const Kernels& kernels, const Step& step, Place x, Place y, std::vector<int32_t> off);

// Any other pool, and adaptive ones: window by window.
Op slow_pool(const Step& step, Place x, Place y);

// Pixels repeated or shuffled, and padded.
Op resize(const Step& step, Place x, Place y);

// Maps of another size, by interpolation or with pads.
Op fit(const Step& step, Place x, Place y);

// Every group of channels of every image normalised.
Op norm(const Kernels& kernels, const Step& step, Place x, Place y);

Op linear(const Kernels& kernels, const Step& step, Place x, Place y);

struct Conv {
    struct Part {
        int first_vector, last_vector, first_tile, last_tile, first_absent, last_absent;
    };
    const Kernels& kernels;
    const Step& step;
    Place x, y;
    std::optional<Place> add;
    Vectors vectors; // of y
    std::shared_ptr<const Packed> packed;
    bool in_place = false; // y is the residual: its pads are zero already
    bool skip_absent = false;
    std::vector<std::vector<int32_t>> off; // per group
    std::vector<int64_t> tile_planes;      // y planes of all tiles, then add planes
    std::vector<int> tile_begin;           // per tile, into tile_planes
    int64_t scratch = 0, scratch_size = 0; // in the arena, one for each worker
    int block_vectors = 24;                // vectors that all filters process before the next
    std::vector<int> block_terms;          // per group: terms of the reduction in one pass
    std::vector<Part> parts;
    Conv(const Kernels& kernels, const Step& step, Place x, Place y)
        : kernels(kernels), step(step), x(std::move(x)), y(std::move(y)),
          vectors(cover(this->y.geometry, kernels.lanes)) {}
    void run(const Part& part, const Context& context) const;

  protected:
    // What belongs to a tile: weights, biases and planes.
    void choose(TileCall& call, int tile) const;
    // Absent channels of a part, and the pads of the rows that it writes. units: vectors or bands in all.
    void prepare(const Part& part, const Context& context, int units, bool clear_columns) const;
};

// The same by products of matrices.
struct MatrixConv : Conv {
    std::vector<int> height, matrices, row_step; // per group, of MatrixRows
    explicit MatrixConv(Conv&& plain) : Conv(std::move(plain)) {}
    void run(const Part& part, const Context& context) const;
};

// The same by Winograd's method over bands of rows; a part's vectors are bands. Patches: over patches of a band.
// Stacked: a vector is a pair of bands, and a part has all of them.
struct BandConv : Conv {
    const Winograd form;
    const bool patches = form == Winograd::patches, stacked = form == Winograd::stacked;
    std::vector<int> used;                  // channels of x that are read
    std::vector<float> zeros;               // a row outside the map
    std::vector<int32_t> at;                // displacement of each vector of sums in an output row
    int block_columns = 0, sum_columns = 0; // vectors that are transformed, and summed by all filters, at a time
    int64_t pitch = 0, channel = 0, tap = 0; // floats from sum to sum, channel to channel and tap to tap
    BandConv(const Conv& plain, Winograd form) : Conv(plain), form(form) {}
    void run(const Part& part, const Context& context) const;

  private:
    void transform(float* to, int band, int column, int columns, const Context& context) const;
};

} // namespace dsp
