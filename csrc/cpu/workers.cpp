#include "workers.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace dsp {

namespace {

struct Job {
    const std::function<void()>* body;
    int wanted;     // helpers that may still come
    int inside = 0; // helpers in body()
};

class Pool {
  public:
    explicit Pool(pid_t owner) : owner(owner) {}
    const pid_t owner;

    void run(int threads, const std::function<void()>& body) {
        Job job{&body, threads - 1};
        {
            std::lock_guard<std::mutex> lock(mutex_);
            // One thread per core that a call may use; calls at the same time share them.
            while (count_ < job.wanted) {
                try {
                    std::thread([this] { work(); }).detach();
                } catch (const std::system_error&) {
                    break; // no more threads to be had: those that exist do the work
                }
                ++count_;
            }
            jobs_.push_back(&job);
        }
        for (int i = 0; i < threads - 1; ++i) wake_.notify_one();
        body();
        std::unique_lock<std::mutex> lock(mutex_);
        jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
        done_.wait(lock, [&] { return job.inside == 0; });
    }

    int count() {
        std::lock_guard<std::mutex> lock(mutex_);
        return count_;
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !jobs_.empty(); });
            Job* job = jobs_.front();
            if (--job->wanted == 0) jobs_.pop_front();
            ++job->inside;
            lock.unlock();
            (*job->body)();
            lock.lock();
            if (--job->inside == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job*> jobs_;
    int count_ = 0;
};

Pool& pool() {
    // A forked child has none of its parent's threads and takes a pool of its own. Pools are never destroyed:
    // their threads may outlive the statics of this library.
    static std::mutex mutex;
    static Pool* current = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    if (!current || current->owner != getpid()) current = new Pool(getpid());
    return *current;
}

} // namespace

void run_team(int threads, const std::function<void()>& body) {
    if (threads <= 1) return body();
    pool().run(std::min(threads, 256), body);
}

int worker_count() { return pool().count(); }

void Patience::wait() {
    if (++turns_ < 4000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else {
        sched_yield(); // more threads than cores: let the one that is waited for run
    }
}

} // namespace dsp
