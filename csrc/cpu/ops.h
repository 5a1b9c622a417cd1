// The operations of a plan. Each holds all displacements ready; running one only computes.
#pragma once

#include "plan.h"

namespace dsp {

// A value in the arena.
struct Place {
    Geometry geometry;
    int64_t offset = 0; // of its first pixel in the arena; a view has none
    std::vector<int64_t> planes; // of each channel's first pixel in the arena
    float* in(const Context& context) const { return context.arena + offset; }
    float* plane(const Context& context, int channel) const { return context.arena + planes[channel]; }
};

// Everything that is not a pixel, from before plane `first` to before plane `last`, becomes 0.
void clear_pads(const Place& place, float* base, int first, int last, bool columns);

// Planes `first` to `last`, cut into `parts`: the `part`-th piece.
struct Range {
    int first, last;
};
Range cut(int total, int parts, int part);

// NCHW (any strides) into the planar layout.
class LoadOp : public Op {
  public:
    Place to;
    int number;
    std::vector<char> used; // per channel; the pixels of others are never read
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "load"; }
};

// The planar layout into a caller's tensor (any strides).
class StoreOp : public Op {
  public:
    Place from;
    int number;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "store"; }
};

// Rows and columns sorted by their phase under a stride: plane (phase, c) holds x[c, phase + stride * i]. In pairs, a
// plane holds words of two channels.
class SplitOp : public Op {
  public:
    struct Plane {
        int channel, other, row_phase, column_phase, to;
    };
    const Kernels* kernels;
    Place from, to;
    Pair stride;
    const WordKernels* pairs = nullptr;
    std::vector<Plane> planes;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return pairs ? "pair" : "split"; }

  private:
    void pair_whole(const Plane& plane, const Context& context) const;
};

class ConvOp : public Op {
  public:
    struct Chunk {
        int first_vector, last_vector, first_tile, last_tile, first_absent, last_absent;
    };
    const Kernels* kernels;
    const Step* step;
    std::shared_ptr<const Packed> packed;
    Place x, y, add;
    bool has_add = false;
    bool in_place = false; // y is the residual: its pads are clear already
    bool skip_absent = false;
    Vectors vectors;
    std::vector<std::vector<int32_t>> off; // per group
    std::vector<int64_t> tile_planes;      // y planes of all tiles, then add planes
    std::vector<int> tile_begin;           // per tile, into tile_planes
    int block_vectors = 24;                // vectors that all filters pass over before the next
    std::vector<int> block_terms;          // per group: terms of the reduction in one pass
    std::vector<Chunk> parts;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "conv"; }

  protected:
    // Absent channels of a chunk, and the pads of the planes that it writes.
    void prepare(const Chunk& part, const Context& context, bool clear_columns) const;
};

// The same by Winograd's method over bands of rows, or over patches of a band; a chunk's vectors are bands.
class BandConvOp : public ConvOp {
  public:
    explicit BandConvOp(const ConvOp& plain) : ConvOp(plain) {}
    bool patches = false;
    std::vector<int> used;       // channels of x that are read
    std::vector<float> zeros;    // what a row outside the map holds
    std::vector<int32_t> at;     // displacement of each vector of sums in an output row
    int block_columns = 0, sum_columns = 0; // vectors that are transformed, and summed by all filters, at a time
    int64_t pitch = 0, channel = 0; // floats of the transformed rows from sum to sum and from channel to channel
    int64_t scratch = 0, scratch_size = 0; // in the arena, one for each worker
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return patches ? "conv in patches" : "conv in bands"; }

  private:
    void transform(float* to, int band, int column, int columns, const Context& context) const;
};

// act(x * scale + shift + other).
class MapOp : public Op {
  public:
    const Kernels* kernels;
    const Step* step;
    Place a, b, y;
    bool has_b = false;
    Vectors vectors;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "map"; }
};

// act(a * b); b may be a single pixel.
class ProductOp : public Op {
  public:
    const Kernels* kernels;
    Act act;
    Place a, b, y;
    bool one_pixel = false;
    Vectors vectors;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "product"; }
};

// Pools whose pads may count as zeros: by displacement list on a split input.
class FastPoolOp : public Op {
  public:
    const Kernels* kernels;
    Place x, y;
    Vectors vectors;
    std::vector<int32_t> off;
    bool average;
    float scale;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "pool"; }
};

// Any other pool: window by window.
class PoolOp : public Op {
  public:
    const Step* step;
    Place x, y;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "slow pool"; }
};

class MeanOp : public Op {
  public:
    Place x, y;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "mean"; }
};

// The mean of each of h x w parts of the map, as PyTorch cuts them: they overlap where sizes do not divide.
class AdaptiveOp : public Op {
  public:
    Place x, y;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "adaptive"; }
};

class LinearOp : public Op {
  public:
    const Kernels* kernels;
    const Step* step;
    Place x, y;
    std::vector<int32_t> off;
    void run(int chunk, const Context& context) const override;
    const char* name() const override { return "linear"; }
};

} // namespace dsp
