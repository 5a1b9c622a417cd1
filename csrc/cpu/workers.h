// Threads that help a call. A helper looks 0.2 ms for the next call and then sleeps.
#pragma once

#include <functional>

namespace dsp {

// Runs body() on this thread and on up to `threads` - 1 helpers at the same time, and returns when all of them
// have left it. body() must be right when it runs once only: a helper may come late or never. What it throws on
// any thread is thrown here when all have left; it must not throw where the others wait for what it does.
void run_team(int threads, const std::function<void()>& body);

// Helper threads that exist in this process.
int worker_count();

// One turn of waiting for another thread: a pause, and after many of them a yield of the core.
class Patience {
  public:
    void wait();

  private:
    int turns_ = 0;
};

} // namespace dsp
