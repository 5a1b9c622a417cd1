// Runs a Network on batches of images of any size, with threads.
#pragma once

#include <list>

#include "plan.h"

namespace dsp {

struct CallKey {
    std::vector<Size> sizes; // of each input
    int64_t images;
    int threads;
    int interleave; // 0: by the rule of divide()
    bool operator==(const CallKey& other) const {
        return images == other.images && threads == other.threads && interleave == other.interleave &&
               sizes == other.sizes;
    }
};

// A range of the images of one call.
struct Share {
    int64_t first;
    int64_t count;
    int interleave;
    bool together; // all threads work on one block after the other; otherwise each thread on its own blocks
    std::shared_ptr<const Plan> plan{};
};

// How a call is computed, except for its memory.
struct Route {
    CallKey key;
    PlanSummary summary; // of one image
    std::vector<Share> shares;
};
using RoutePtr = std::shared_ptr<const Route>;
using Routes = std::list<RoutePtr>;

// Safe to call from any number of threads at once. Sizes and channels must have been checked by the caller.
void run(const Route& route, const std::vector<Images>& inputs, const std::vector<Images>& outputs);

// A Network with the routes of its last calls. Only make() may run in several threads at once; Python's lock guards the
// other methods, so a call takes no lock here, and fork() finds none held.
class Session {
  public:
    template <typename... Arguments> // of a Network
    explicit Session(const Arguments&... arguments) : network_(arguments...) {}

    Network& network() { return network_; } // complete before anything else is called
    const Network& network() const { return network_; }
    const Routes& routes() const { return routes_; } // the most recently used first

    // Throws std::invalid_argument if the sizes are impossible. known: routes that may tell it.
    PlanSummary summary(const std::vector<Size>& sizes, const Routes& known) const;
    RoutePtr find(const CallKey& key); // or null
    // known: routes whose plans it may share.
    RoutePtr make(const CallKey& key, const Routes& known) const;
    // The route itself, or the same one that another thread has made meanwhile.
    RoutePtr keep(RoutePtr made);

  private:
    Network network_;
    Routes routes_;
};

} // namespace dsp
