#include "run.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <new>
#include <thread>

namespace dsp {

namespace {

// -- Threads --

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How long a helper polls for the next call before it sleeps, and a call for its last helper to leave. Waking a
// sleeping thread takes about 30 us, a tenth of a small network at batch 1; in a loop of calls none sleeps.
constexpr auto brief = std::chrono::microseconds(200);

struct Job {
    const std::function<void(int)>* body;
    int wanted;                 // helpers that may still join
    int rank = 0;               // of the last that joined
    std::atomic<int> inside{0}; // helpers in body()
    std::exception_ptr error;   // of a helper
    Job(const std::function<void(int)>* body, int wanted) : body(body), wanted(wanted) {}
};

// Polls ready() for a short time; false if it stayed false.
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

// An exception must not leave a helper thread, and the job must always be removed from the list.
std::exception_ptr attempt(const std::function<void(int)>& body, int rank) {
    try {
        body(rank);
    } catch (...) {
        return std::current_exception();
    }
    return nullptr;
}

class Pool {
  public:
    explicit Pool(pid_t owner) : owner(owner) {}
    const pid_t owner;

    void run(int threads, const std::function<void(int)>& body) {
        Job job{&body, threads - 1};
        {
            std::lock_guard<std::mutex> lock(mutex_);
            // Concurrent calls share the helpers. If no thread can be started, those that exist do the work.
            while (count_ < job.wanted && start_helper()) ++count_;
            jobs_.push_back(&job);
            waiting_.store(int(jobs_.size()), std::memory_order_release);
        }
        for (int i = 0; i < threads - 1; ++i) wake_.notify_one();
        std::exception_ptr error = attempt(body, 0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
            waiting_.store(int(jobs_.size()), std::memory_order_release);
        }
        // No helper can join now. A helper's last access to the job is under the lock, so it is taken again.
        briefly([&] { return job.inside.load(std::memory_order_acquire) == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return job.inside == 0; });
        if (!error) error = job.error;
        if (error) std::rethrow_exception(error);
    }

  private:
    // Signals of the process are left to the program's own threads.
    bool start_helper() {
        sigset_t all, before;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault); // for crash handlers
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
            const int rank = ++job->rank;
            lock.unlock();
            const std::exception_ptr error = attempt(*job->body, rank);
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
    std::atomic<int> waiting_{0}; // size of jobs_, readable without the lock
    int count_ = 0;
};

Pool& pool() {
    // A forked child has none of its parent's threads and gets a pool of its own. Pools are never destroyed: their
    // threads may outlive the statics of this library.
    static std::atomic<Pool*> current{nullptr};
    const pid_t process = getpid();
    Pool* known = current.load();
    if (known && known->owner == process) return *known;
    auto made = std::make_unique<Pool>(process);
    return *(current.compare_exchange_strong(known, made.get()) ? made.release() : known);
}

// Runs body(0) on this thread and body(1), body(2) and so on concurrently on up to `threads` - 1 helpers, and returns
// when all have left it. body(0) must be correct alone: a helper may come late or never. An exception on any thread is
// rethrown here when all have left, so it must not occur where the others wait for its thread.
void run_team(int threads, const std::function<void(int)>& body) {
    if (threads <= 1) return body(0);
    pool().run(std::min(threads, 256), body);
}

// -- Blocks of images --

// Kept per network: a few image sizes at a few batch sizes. A plan has about 4 bytes for a pixel and kind of map.
constexpr size_t most_routes = 16;
constexpr int64_t most_pixels = int64_t(1) << 22;

// Scratch memory for one block of images. Every thread has its own, which all networks share.
class Scratch {
  public:
    ~Scratch() { release(); }

    float* take(int64_t floats) {
        const size_t bytes = (size_t(floats) * sizeof(float) + huge - 1) / huge * huge;
        if (bytes > bytes_) {
            release();
            memory_ = allocate(bytes), bytes_ = bytes;
        }
        return memory_;
    }

    // Less is kept for the next call. Mapping the memory of larger images anew costs about 3 % of their time: ten
    // convolutions of 32 channels on 1024x1024 pixels (268 MB) 0.75 s, of which 0.02 s (Zen 4, one thread); 10 % where
    // each is a call of its own (swap).
    void give() {
        if (bytes_ > size_t(64) << 20) release();
    }

  private:
    static constexpr size_t huge = size_t(2) << 20; // pages

    // Mapped directly: in the heap, blocks of many sizes would cause fragmentation.
    static float* allocate(size_t bytes) {
        void* const mapped = mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        char* const begin = static_cast<char*>(mapped);
        char* const memory = begin + (huge - reinterpret_cast<uintptr_t>(begin) % huge) % huge;
        if (memory != begin) munmap(begin, memory - begin);
        if (memory != begin + huge) munmap(memory + bytes, begin + huge - memory);
#ifdef MADV_HUGEPAGE
        // Planes are in different small pages; huge pages avoid TLB misses.
        madvise(memory, bytes, MADV_HUGEPAGE);
#endif
        return reinterpret_cast<float*>(memory);
    }

    void release() {
        if (bytes_) munmap(memory_, bytes_);
        memory_ = nullptr, bytes_ = 0;
    }

    float* memory_ = nullptr;
    size_t bytes_ = 0;
};

thread_local Scratch scratch;

struct Arena { // given back on exceptions too
    float* const memory;
    explicit Arena(const Plan& plan) : memory(scratch.take(plan.arena_floats)) {}
    ~Arena() { scratch.give(); }
};

// How a batch is divided. A single image is shared by all threads: as separate blocks, each thread would read the same
// weights and compete for the shared cache. Otherwise each thread takes blocks of its own, with as many interleaved
// images as leave a block for every thread; the remainder is shared again.
std::vector<Share> divide(int64_t images, int threads, int lanes, int64_t image_bytes) {
    // Large images are interleaved less, to keep the tensors of a block in the cache: ResNet-50 80 % (8 MB an image) at
    // batch 8 on 2 threads takes 66.7 ms together, apart 61.3 at I=1, 60.7 at 2, 66.3 at 4; ResNet-18 80 % 23.5
    // together, 23.7, 22.3 and 22.4.
    constexpr int64_t cache = 1 << 20;
    const int widest = std::min(lanes, image_bytes > cache ? 2 : 16);
    std::vector<Share> shares;
    int64_t first = 0;
    while (first < images) {
        const int64_t left = images - first;
        if (left < threads || left == 1) {
            shares.push_back({first, 1, 1, true});
            first += 1;
            continue;
        }
        int I = 1;
        while (I * 2 <= widest && int64_t(I) * 2 * threads <= left) I *= 2;
        const int64_t blocks = left / (int64_t(I) * threads) * threads;
        shares.push_back({first, blocks * I, I, false});
        first += blocks * I;
    }
    return shares;
}

void run_apart(const Share& share, const std::vector<Images>& inputs, const std::vector<Images>& outputs, int threads) {
    const Plan& plan = *share.plan;
    const int I = share.interleave;
    const int64_t blocks = (share.count + I - 1) / I;
    std::atomic<int64_t> next{0};
    const std::function<void(int)> body = [&](int) {
        int64_t block = next.fetch_add(1);
        if (block >= blocks) return;
        Arena arena(plan);
        for (; block < blocks; block = next.fetch_add(1)) {
            const int64_t first = share.first + block * I;
            const int count = int(std::min<int64_t>(I, share.first + share.count - first));
            const Context context{arena.memory, &inputs, &outputs, first, count, 0};
            for (const Op& op : plan.ops)
                for (int chunk = 0; chunk < op.chunks; ++chunk) op.run(chunk, context);
        }
    };
    run_team(int(std::min<int64_t>(threads, blocks)), body);
}

void run_together(const Share& share, const std::vector<Images>& inputs, const std::vector<Images>& outputs,
                  int threads) {
    const Plan& plan = *share.plan;
    // Chunks are taken one by one, so a helper that wakes up late joins where the others are. But each thread begins
    // with chunks of its own, the same in every operation and call: neighbouring chunks are neighbouring rows, which
    // are then in its cache. A line from another core costs 0.1 to 0.3 us, so what a thread writes is in lines of its
    // own, and for one operation it reads one line of each other thread.
    struct alignas(128) Worker {
        std::atomic<int64_t> done{0}; // chunks that it has run since the beginning
        std::atomic<bool> joined{false};
    };
    const auto own = [&](const Op& op, int rank) { return cut(op.chunks, threads, rank); };
    int most = 1; // chunks of one thread in one operation
    for (const Op& op : plan.ops) most = std::max(most, (op.chunks + threads - 1) / threads);
    const int64_t stride = round_up(int64_t(plan.ops.size()) * most, 128);
    Arena arena(plan);
    const int I = share.interleave;
    for (int64_t first = share.first; first < share.first + share.count; first += I) {
        const int count = int(std::min<int64_t>(I, share.first + share.count - first));
        std::vector<Worker> workers(threads);
        std::unique_ptr<std::atomic<bool>[]> taken(new std::atomic<bool>[stride * threads]());
        const std::function<void(int)> body = [&](int rank) {
            const Context context{arena.memory, &inputs, &outputs, first, count, rank};
            Worker& self = workers[rank];
            self.joined.store(true, std::memory_order_relaxed);
            int64_t end = 0; // chunks of the operations up to this one
            const auto complete = [&] {
                int64_t done = 0;
                for (const Worker& worker : workers) done += worker.done.load(std::memory_order_acquire);
                return done >= end;
            };
            for (size_t n = 0; n < plan.ops.size(); ++n) {
                const Op& op = plan.ops[n];
                end += op.chunks;
                const auto run_chunks = [&](int of) {
                    const Range range = own(op, of);
                    std::atomic<bool>* const flags = taken.get() + of * stride + int64_t(n) * most;
                    for (int chunk = range.first; chunk < range.last; ++chunk) {
                        std::atomic<bool>& flag = flags[chunk - range.first];
                        if (flag.load(std::memory_order_relaxed) || flag.exchange(true, std::memory_order_relaxed))
                            continue;
                        op.run(chunk, context);
                        self.done.store(self.done.load(std::memory_order_relaxed) + 1, std::memory_order_release);
                    }
                };
                run_chunks(rank);
                for (int turn = 0; !complete(); ++turn) {
                    // After many turns there are more threads than cores: let the awaited one run.
                    turn < 4000 ? pause_core() : void(sched_yield());
                    for (int other = 0; other < threads; ++other)
                        if (turn == 50 || !workers[other].joined.load(std::memory_order_relaxed)) run_chunks(other);
                }
            }
        };
        run_team(threads, body);
    }
}

} // namespace

void run(const Route& route, const std::vector<Images>& inputs, const std::vector<Images>& outputs) {
    for (const Share& share : route.shares)
        if (share.plan->key.threads > 1)
            run_together(share, inputs, outputs, route.key.threads);
        else
            run_apart(share, inputs, outputs, route.key.threads);
}

PlanSummary Session::summary(const std::vector<Size>& sizes, const Routes& known) const {
    for (const auto& route : known)
        if (route->key.sizes == sizes) return route->summary;
    return summarize(network_, {sizes, 1, 1});
}

RoutePtr Session::find(const CallKey& key) {
    const auto found = std::find_if(routes_.begin(), routes_.end(), [&](const auto& one) { return one->key == key; });
    if (found == routes_.end()) return nullptr;
    if (found != routes_.begin()) routes_.splice(routes_.begin(), routes_, found);
    return routes_.front();
}

RoutePtr Session::make(const CallKey& key, const Routes& known) const {
    Route made{key, summary(key.sizes, known), {}};
    if (key.interleave > 0)
        made.shares = {{0, key.images, key.interleave, key.images <= key.interleave && key.threads > 1}};
    else
        made.shares = divide(key.images, key.threads, network_.kernels.lanes,
                             made.summary.arena_floats * int64_t(sizeof(float)));
    for (Share& share : made.shares) {
        const PlanKey wanted{key.sizes, share.interleave, share.together ? key.threads : 1};
        const auto reuse = [&](const std::vector<Share>& shares) {
            for (const Share& one : shares)
                if (one.plan && one.plan->key == wanted) share.plan = one.plan;
        };
        reuse(made.shares);
        for (const auto& route : known) reuse(route->shares);
        if (!share.plan) share.plan = std::make_shared<const Plan>(network_, wanted);
    }
    return std::make_shared<const Route>(std::move(made));
}

RoutePtr Session::keep(RoutePtr made) {
    if (RoutePtr found = find(made->key)) return found;
    routes_.push_front(std::move(made));
    int64_t pixels = 0;
    size_t kept = 0;
    for (const auto& route : routes_) {
        for (const Size& size : route->key.sizes) pixels += int64_t(size.h) * size.w;
        if (kept == most_routes || (kept > 0 && pixels > most_pixels)) break;
        ++kept;
    }
    routes_.resize(kept);
    return routes_.front();
}

} // namespace dsp
