// A Network ready to be called with images of any size, from any number of threads at once.
#pragma once

#include <list>
#include <mutex>

#include "network.h"
#include "plan.h"

namespace dsp {

// How the images of one call are divided.
struct Share {
    int64_t first;
    int64_t count;
    int interleave;
    bool together; // all threads work on one block after the other; else every thread on its own blocks
};

// The rule. One image whose scratch outgrows the second-level cache is shared by all threads, one image after the
// other: each on its own would read the same weights and fight for the shared cache. Small images go to one
// thread each, as many interleaved as every thread gets; what is left over is shared again.
std::vector<Share> divide(int64_t images, int threads, int lanes, int64_t image_bytes);

class Session {
  public:
    explicit Session(std::unique_ptr<Network> network);

    const Network& network() const { return *network_; }

    // (channels, h, w) of each output for these input sizes. Throws std::invalid_argument for impossible ones.
    std::vector<std::vector<int>> output_shapes(const std::vector<Size>& sizes);

    // Sizes and channels must have been checked by the caller. interleave 0 chooses by the rule of divide().
    void run(const std::vector<Size>& sizes, int64_t images, const std::vector<Images>& inputs,
             const std::vector<Images>& outputs, int threads, int interleave = 0);

    struct Timing {
        std::string name;
        int value;      // that the operation makes, or -1
        double seconds; // median of one run for `interleave` images on one thread
    };
    std::vector<Timing> profile(const std::vector<Size>& sizes, const std::vector<Images>& inputs,
                                const std::vector<Images>& outputs, int images, int interleave, int repeats);

    // Bytes of scratch that lie idle, and plans that are kept.
    int64_t scratch_bytes();
    int plan_count();

  private:
    std::shared_ptr<const Plan> plan(const PlanKey& key);
    void run_apart(const Plan& plan, const Share& share, const std::vector<Images>& inputs,
                   const std::vector<Images>& outputs, int threads) const;
    void run_together(const Plan& plan, const Share& share, const std::vector<Images>& inputs,
                      const std::vector<Images>& outputs, int threads) const;

    std::unique_ptr<Network> network_;
    std::mutex mutex_;
    std::list<std::shared_ptr<const Plan>> plans_; // the latest used first
    struct Shapes {
        std::vector<Size> sizes;
        std::vector<std::vector<int>> outputs;
        int64_t image_bytes; // scratch of one image
    };
    std::list<Shapes> shapes_; // the same
    Shapes shapes(const std::vector<Size>& sizes);
};

} // namespace dsp
