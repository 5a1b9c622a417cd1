// A Network for one image size and one number of interleaved images: geometry, memory and work items.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "network.h"

namespace dsp {

// Where the pixels of one value lie, in floats from its first pixel of channel 0.
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
    std::vector<int32_t> mask; // [vectors][lanes], or empty: every lane is a pixel
    bool covers_pads = false;  // the vectors run through the pad columns and write 0 there
};

// The images of one call that a block works on, and where they come from or go to.
struct Images {
    float* base;
    int64_t stride[4]; // image, channel, row, column, in floats
};

struct Context {
    float* arena;
    const std::vector<Images>* inputs;
    const std::vector<Images>* outputs;
    int64_t first; // image
    int count;     // images, at most interleave
    int worker;    // of the threads that share the arena, from 0
};

// One piece of work; chunks of it may run at the same time.
class Op {
  public:
    virtual ~Op() = default;
    virtual void run(int chunk, const Context& context) const = 0;
    virtual const char* name() const = 0;
    int chunks = 1;
    int made = -1; // value of the network that it makes, or -1
};

struct PlanKey {
    std::vector<Size> sizes; // of each input
    int interleave;
    int threads; // that share an operation
    int parts() const { return threads > 1 ? 2 * threads : 1; } // into how many chunks it is cut, at most about
    bool operator==(const PlanKey& other) const;
};

class Plan {
  public:
    Plan(const Network& network, const PlanKey& key);

    PlanKey key;
    std::vector<std::unique_ptr<Op>> ops;
    int64_t arena_floats = 0;

    // Scratch of one block, kept for the next call. At most `keep` lie idle.
    float* take_arena() const;
    void give_arena(float* arena, int keep) const;
    int64_t idle_bytes() const;
    ~Plan();
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

  private:
    mutable std::mutex mutex_;
    mutable std::vector<float*> idle_;
};

// Pixels of a window's output along one axis; -1 if the input is smaller than the window.
int output_size(int size, int kernel, int stride, int padding, int dilation, bool ceil_mode = false);

// The next multiple of m.
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

Vectors cover(const Geometry& geometry, int lanes);

} // namespace dsp
