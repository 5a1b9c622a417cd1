// A Network planned for one image size and one number of interleaved images: the geometry and memory of its tensors,
// and its operations in order.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "network.h"

namespace dsp {

// The layout of one tensor, in floats from its first pixel of channel 0.
struct Geometry {
    int channels = 0, h = 0, w = 0;
    int interleave = 1;
    int64_t pitch = 0; // pixels from row to row
    int64_t plane = 0; // floats from channel to channel
    int64_t lead = 0;  // floats before the first pixel
    int64_t size = 0;  // floats in all
    int64_t at(int64_t c, int64_t y, int64_t x) const { return c * plane + (y * pitch + x) * interleave; }
};

// The vectors that cover all pixels of a plane.
struct Vectors {
    std::vector<int32_t> at;
    std::shared_ptr<const std::vector<int32_t>> mask; // [vectors][lanes], or null: every lane is a pixel
    bool covers_pads = false;  // the vectors include the pad columns and write 0 there
    int64_t count() const { return int64_t(at.size()); }
    const int32_t* mask_from(int64_t vector, int lanes) const {
        return mask ? mask->data() + vector * lanes : nullptr;
    }
};
Vectors cover(const Geometry& geometry, int lanes);

// A caller's batch of images.
struct Images {
    float* base;
    int64_t stride[4]; // image, channel, row, column, in floats
};

// One block of images on its way through the plan.
struct Context {
    float* arena;
    const std::vector<Images>* inputs;
    const std::vector<Images>* outputs;
    int64_t first; // image
    int count;     // images, at most interleave
    int worker;    // index among the threads that share the arena
};

// A tensor in the arena.
struct Place {
    Geometry geometry;
    std::vector<int64_t> planes; // of each channel's first pixel in the arena
    float* plane(const Context& context, int channel) const { return context.arena + planes[channel]; }
    float* in(const Context& context) const { return plane(context, 0); }
};

// The `part`-th of `parts` pieces of [0, total).
struct Range {
    int first, last;
};
inline Range cut(int total, int parts, int part) {
    return {int(int64_t(total) * part / parts), int(int64_t(total) * (part + 1) / parts)};
}

// What an operation does, counted; a linear model of these is its time (dsp_kernels/times). Of plain sums, then of
// Winograd's method: cycles of arithmetic or of loads, whichever takes longer, tiles that are run, vectors of sums and
// of pixels that are finished. held: floats of weights, once. traffic: floats of maps; fresh: those written to memory
// that held another map. The rest are of the other operations.
DSP_ENUM(Count, operations, bound, passes, sums, band_bound, band_sums, band_outputs, band_edges, transforms,
         patch_transforms, rows, held, traffic, fresh, cleared, mapped, pooled, thinned, gathered, thin_rows, copied,
         interleaved, averaged, windows, multiplied)
struct Work {
    std::array<double, size_t(Count::multiplied) + 1> counts{};
    double& operator[](Count count) { return counts[size_t(count)]; }
    double cycles() const; // a rough estimate
};

// One operation; its chunks may run concurrently.
struct Op {
    const char* name;
    int units; // channels, planes or parts, of which a chunk is a range
    std::function<void(int first, int last, const Context& context)> body;
    int chunks = 1;
    int made = -1;        // the network's value that it computes, or -1
    std::string detail{}; // of a convolution, its tiles
    std::function<Work(int first, int last)> work{}; // of a range of units
    void run(int chunk, const Context& context) const {
        const Range range = cut(units, chunks, chunk);
        body(range.first, range.last, context);
    }
    // Of the thread with most of it, when each of `threads` begins with the same share of the chunks.
    Work busiest(int threads) const;
};

struct PlanKey {
    std::vector<Size> sizes; // of each input
    int interleave;
    int threads;                                                // that share an operation
    int parts() const { return threads > 1 ? 2 * threads : 1; } // target number of chunks of an operation
    bool operator==(const PlanKey& other) const {
        return interleave == other.interleave && threads == other.threads && sizes == other.sizes;
    }
};

struct Plan {
    Plan(const Network& network, const PlanKey& key);

    const PlanKey key;
    std::vector<Op> ops;
    int64_t arena_floats = 0; // scratch memory of one block
};

// What is known of a plan without building its operations.
struct PlanSummary {
    std::vector<std::vector<int>> outputs; // channels, height, width of each
    int64_t arena_floats;
};
PlanSummary summarize(const Network& network, const PlanKey& key);

// Output pixels of a sliding window along one axis; -1 if the input is smaller than the window.
int output_size(int size, int kernel, int stride, int padding, int dilation, bool ceil_mode = false);

// The next multiple of m.
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

} // namespace dsp
