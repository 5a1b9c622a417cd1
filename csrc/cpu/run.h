// Runs a Network on batches of images of any size, with threads.
#pragma once

#include <list>

#include "plan.h"

namespace dsp {

// A Network with its plans. Safe to call from any number of threads at once.
class Session {
  public:
    explicit Session(std::unique_ptr<Network> network);

    const Network& network() const { return *network_; }

    // (channels, h, w) of each output for these input sizes. Throws std::invalid_argument if they are impossible.
    std::vector<std::vector<int>> output_shapes(const std::vector<Size>& sizes) { return shapes(sizes).outputs; }

    // Sizes and channels must have been checked by the caller. interleave 0 chooses by the rule of divide().
    void run(const std::vector<Size>& sizes, int64_t images, const std::vector<Images>& inputs,
             const std::vector<Images>& outputs, int threads, int interleave = 0);

    // (name, value or -1) of each operation of a plan for one thread.
    std::vector<std::pair<std::string, int>> operations(const std::vector<Size>& sizes, int interleave);

    int64_t scratch_bytes(); // of idle arenas
    int plan_count();

  private:
    struct Shapes {
        std::vector<Size> sizes;
        std::vector<std::vector<int>> outputs;
        int64_t image_bytes; // scratch of one image
    };
    std::shared_ptr<const Plan> plan(const PlanKey& key);
    Shapes shapes(const std::vector<Size>& sizes);

    std::unique_ptr<Network> network_;
    std::mutex mutex_;
    // The most recently used first.
    std::list<std::shared_ptr<const Plan>> plans_;
    std::list<Shapes> shapes_;
};

} // namespace dsp
