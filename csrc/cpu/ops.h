// The operations of a plan, with all displacements precomputed.
#pragma once

#include "plan.h"

namespace dsp {

// Zeroes all floats that are not pixels, from before plane `first` to before plane `last`.
void clear_pads(const Place& place, float* base, int first, int last, bool columns);

// The `part`-th of `parts` pieces of [0, total).
struct Range {
    int first, last;
};
Range cut(int total, int parts, int part);

// NCHW (any strides) into the planar layout.
struct LoadOp : Op {
    const Place to;
    const int number;             // of the input
    const std::vector<char> used; // per channel; the pixels of others are never read
    LoadOp(Place to, int number, std::vector<char> used)
        : Op("load"), to(std::move(to)), number(number), used(std::move(used)) {}
    void run(int chunk, const Context& context) const override;
};

// The planar layout into a caller's tensor (any strides).
struct StoreOp : Op {
    const Place from;
    const int number; // of the output
    StoreOp(Place from, int number) : Op("store"), from(std::move(from)), number(number) {}
    void run(int chunk, const Context& context) const override;
};

// Rows and columns sorted by their phase under a stride: plane (phase, c) holds x[c, phase + stride * i]. In pairs, a
// plane holds words of two channels.
struct SplitOp : Op {
    struct Plane {
        int channel, other, row_phase, column_phase, to;
    };
    const Kernels& kernels;
    const Place from, to;
    const Pair stride;
    const WordKernels* const pairs;
    std::vector<Plane> planes;
    SplitOp(const Kernels& kernels, Place from, Place to, Pair stride, const WordKernels* pairs)
        : Op(pairs ? "pair" : "split"), kernels(kernels), from(std::move(from)), to(std::move(to)), stride(stride),
          pairs(pairs) {}
    void run(int chunk, const Context& context) const override;

  private:
    void pair_whole(const Plane& plane, const Context& context) const;
};

// An operation on a feature map, with the vectors of its output.
struct MapLikeOp : Op {
    const Kernels& kernels;
    const Place x, y;
    const Vectors vectors;
    MapLikeOp(const char* name, const Kernels& kernels, Place x, Place y)
        : Op(name), kernels(kernels), x(std::move(x)), y(std::move(y)),
          vectors(cover(this->y.geometry, kernels.lanes)) {}
};

struct ConvOp : MapLikeOp {
    struct Chunk {
        int first_vector, last_vector, first_tile, last_tile, first_absent, last_absent;
    };
    const Step& step;
    std::shared_ptr<const Packed> packed;
    Place add;
    bool has_add = false;
    bool in_place = false; // y is the residual: its pads are zero already
    bool skip_absent = false;
    std::vector<std::vector<int32_t>> off; // per group
    std::vector<int64_t> tile_planes;      // y planes of all tiles, then add planes
    std::vector<int> tile_begin;           // per tile, into tile_planes
    int block_vectors = 24;                // vectors that all filters process before the next
    std::vector<int> block_terms;          // per group: terms of the reduction in one pass
    std::vector<Chunk> parts;
    ConvOp(const Kernels& kernels, const Step& step, Place x, Place y)
        : MapLikeOp("conv", kernels, std::move(x), std::move(y)), step(step) {}
    void run(int chunk, const Context& context) const override;

  protected:
    // Absent channels of a chunk, and the pads of the planes that it writes.
    void prepare(const Chunk& part, const Context& context, bool clear_columns) const;
};

// The same by Winograd's method over bands of rows, or over patches of a band; a chunk's vectors are bands.
struct BandConvOp : ConvOp {
    const bool patches;
    std::vector<int> used;                  // channels of x that are read
    std::vector<float> zeros;               // a row outside the map
    std::vector<int32_t> at;                // displacement of each vector of sums in an output row
    int block_columns = 0, sum_columns = 0; // vectors that are transformed, and summed by all filters, at a time
    int64_t pitch = 0, channel = 0;        // floats of the transformed rows from sum to sum and from channel to channel
    int64_t scratch = 0, scratch_size = 0; // in the arena, one for each worker
    BandConvOp(const ConvOp& plain, bool patches) : ConvOp(plain), patches(patches) {
        name = patches ? "conv in patches" : "conv in bands";
    }
    void run(int chunk, const Context& context) const override;

  private:
    void transform(float* to, int band, int column, int columns, const Context& context) const;
};

// act(x * scale + shift + b).
struct MapOp : MapLikeOp {
    const Step& step;
    Place b;
    bool has_b = false;
    MapOp(const Kernels& kernels, const Step& step, Place x, Place y)
        : MapLikeOp("map", kernels, std::move(x), std::move(y)), step(step) {}
    void run(int chunk, const Context& context) const override;
};

// act(x * b); b may be a single pixel.
struct ProductOp : MapLikeOp {
    const Act act;
    const Place b;
    ProductOp(const Kernels& kernels, Act act, Place x, Place b, Place y)
        : MapLikeOp("product", kernels, std::move(x), std::move(y)), act(act), b(std::move(b)) {}
    void run(int chunk, const Context& context) const override;
};

// Pools whose pads may count as zeros: by displacements on an input split by phase.
struct FastPoolOp : MapLikeOp {
    FastPoolOp(const Kernels& kernels, Place x, Place y) : MapLikeOp("pool", kernels, std::move(x), std::move(y)) {}
    std::vector<int32_t> off;
    bool average;
    float scale;
    void run(int chunk, const Context& context) const override;
};

// Any other pool: window by window.
struct PoolOp : Op {
    const Step& step;
    const Place x, y;
    PoolOp(const Step& step, Place x, Place y) : Op("slow pool"), step(step), x(std::move(x)), y(std::move(y)) {}
    void run(int chunk, const Context& context) const override;
};

struct MeanOp : Op {
    const Place x, y;
    MeanOp(Place x, Place y) : Op("mean"), x(std::move(x)), y(std::move(y)) {}
    void run(int chunk, const Context& context) const override;
};

// The mean of each of h x w parts of the map with PyTorch's borders: parts overlap where sizes do not divide.
struct AdaptiveOp : Op {
    const Place x, y;
    AdaptiveOp(Place x, Place y) : Op("adaptive"), x(std::move(x)), y(std::move(y)) {}
    void run(int chunk, const Context& context) const override;
};

struct LinearOp : Op {
    const Kernels& kernels;
    const Step& step;
    const Place x, y;
    std::vector<int32_t> off;
    LinearOp(const Kernels& kernels, const Step& step, Place x, Place y)
        : Op("linear"), kernels(kernels), step(step), x(std::move(x)), y(std::move(y)) {}
    void run(int chunk, const Context& context) const override;
};

} // namespace dsp
