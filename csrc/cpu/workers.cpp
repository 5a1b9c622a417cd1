#include "workers.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace dsp {

namespace {

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How long a helper looks for the next call before it sleeps, and a call for its last helper to leave. Waking
// a sleeper takes about 30 us here, a tenth of a small network at batch 1; a loop of calls never sleeps so.
constexpr auto brief = std::chrono::microseconds(200);

struct Job {
    const std::function<void()>* body;
    int wanted;                  // helpers that may still come
    std::atomic<int> inside{0};  // helpers in body()
    std::exception_ptr error;    // of a helper
    Job(const std::function<void()>* body, int wanted) : body(body), wanted(wanted) {}
};

// Waits for ready() for a short time only; false if it did not come true.
template <typename Ready>
bool briefly(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + brief;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause_core();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// No exception may leave a helper, or leave a job in the list behind.
std::exception_ptr attempt(const std::function<void()>& body) {
    try {
        body();
    } catch (...) {
        return std::current_exception();
    }
    return nullptr;
}

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
                if (!start_helper()) break; // no more threads to be had: those that exist do the work
                ++count_;
            }
            jobs_.push_back(&job);
            waiting_.store(int(jobs_.size()), std::memory_order_release);
        }
        for (int i = 0; i < threads - 1; ++i) wake_.notify_one();
        std::exception_ptr error = attempt(body);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
            waiting_.store(int(jobs_.size()), std::memory_order_release);
        }
        // Nobody can enter any more. The helper's last touch of the job is under the lock, so it is taken again.
        briefly([&] { return job.inside.load(std::memory_order_acquire) == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return job.inside == 0; });
        if (!error) error = job.error;
        if (error) std::rethrow_exception(error);
    }

    int count() {
        std::lock_guard<std::mutex> lock(mutex_);
        return count_;
    }

  private:
    // Signals of the process are for threads of the program that waits for them.
    bool start_helper() {
        sigset_t all, before;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault); // whoever reports them
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !jobs_.empty(); });
            Job* job = jobs_.front();
            if (--job->wanted == 0) jobs_.pop_front();
            waiting_.store(int(jobs_.size()), std::memory_order_release);
            ++job->inside;
            lock.unlock();
            const std::exception_ptr error = attempt(*job->body);
            lock.lock();
            if (error) job->error = error;
            if (--job->inside == 0) done_.notify_all();
            if (!jobs_.empty()) continue;
            lock.unlock();
            briefly([this] { return waiting_.load(std::memory_order_acquire) > 0; });
            lock.lock();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job*> jobs_;
    std::atomic<int> waiting_{0}; // size of jobs_, to be read without the lock
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
        pause_core();
    } else {
        sched_yield(); // more threads than cores: let the one that is waited for run
    }
}

} // namespace dsp
