#include "session.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#include "builder.h"
#include "workers.h"

namespace dsp {

namespace {

constexpr size_t most_plans = 16; // kept per network: a few image sizes at a few batch sizes

struct Arena { // returned also when an exception passes
    const Plan& plan;
    int keep;
    float* memory;
    Arena(const Plan& plan, int keep) : plan(plan), keep(keep), memory(plan.take_arena()) {}
    ~Arena() { plan.give_arena(memory, keep); }
};

} // namespace

std::vector<Share> divide(int64_t images, int threads, int lanes, int64_t image_bytes) {
    // Large images are interleaved less, for the values of a block to stay near: ResNet-50 80 % (8 MB an image) at
    // batch 8 on 2 threads takes 66.7 ms together, apart 61.3 at I=1, 60.7 at 2, 66.3 at 4; ResNet-18 80 % 23.5
    // together, 23.7, 22.3 and 22.4.
    constexpr int64_t cache = 1 << 20;
    const int widest = image_bytes > cache ? 2 : 16;
    std::vector<Share> shares;
    int64_t first = 0;
    while (first < images) {
        const int64_t left = images - first;
        if (left < threads || left == 1) {
            shares.push_back({first, 1, 1, true});
            first += 1;
            continue;
        }
        // The widest interleaving that gives every thread a block, up to a vector.
        int I = 1;
        while (I * 2 <= lanes && I * 2 <= widest && int64_t(I) * 2 * threads <= left) I *= 2;
        const int64_t blocks = left / (int64_t(I) * threads) * threads;
        shares.push_back({first, blocks * I, I, false});
        first += blocks * I;
    }
    return shares;
}

Session::Session(std::unique_ptr<Network> network) : network_(std::move(network)) {}

std::shared_ptr<const Plan> Session::plan(const PlanKey& key) {
    const auto find = [&]() -> std::shared_ptr<const Plan> { // under the lock
        for (auto it = plans_.begin(); it != plans_.end(); ++it)
            if ((*it)->key == key) {
                plans_.splice(plans_.begin(), plans_, it);
                return plans_.front();
            }
        return nullptr;
    };
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (auto found = find()) return found;
    }
    // Made outside the lock: other sizes go on meanwhile. Two threads may make the same plan; one is kept.
    auto made = std::make_shared<const Plan>(*network_, key);
    std::lock_guard<std::mutex> lock(mutex_);
    if (auto found = find()) return found;
    plans_.push_front(made);
    while (plans_.size() > most_plans) plans_.pop_back();
    return made;
}

std::vector<std::vector<int>> Session::output_shapes(const std::vector<Size>& sizes) {
    return shapes(sizes).outputs;
}

Session::Shapes Session::shapes(const std::vector<Size>& sizes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = shapes_.begin(); it != shapes_.end(); ++it)
        if (it->sizes == sizes) {
            shapes_.splice(shapes_.begin(), shapes_, it);
            return shapes_.front();
        }
    const PlanKey key{sizes, 1, 1};
    const auto summary = Builder(*network_, key).summary();
    shapes_.push_front({sizes, summary.outputs, summary.arena_floats * int64_t(sizeof(float))});
    while (shapes_.size() > most_plans) shapes_.pop_back();
    return shapes_.front();
}

void Session::run(const std::vector<Size>& sizes, int64_t images, const std::vector<Images>& inputs,
                  const std::vector<Images>& outputs, int threads, int interleave) {
    threads = std::max(threads, 1);
    std::vector<Share> shares = divide(images, threads, network_->kernels.lanes, shapes(sizes).image_bytes);
    if (interleave > 0) shares = {{0, images, interleave, images <= interleave && threads > 1}};
    for (const Share& share : shares) {
        const auto made = plan({sizes, share.interleave, share.together ? threads : 1});
        if (made->key.threads > 1)
            run_together(*made, share, inputs, outputs, threads);
        else
            run_apart(*made, share, inputs, outputs, threads);
    }
}

void Session::run_apart(const Plan& plan, const Share& share, const std::vector<Images>& inputs,
                        const std::vector<Images>& outputs, int threads) const {
    const int I = share.interleave;
    const int64_t blocks = (share.count + I - 1) / I;
    std::atomic<int64_t> next{0};
    const std::function<void()> body = [&] {
        int64_t block = next.fetch_add(1);
        if (block >= blocks) return;
        Arena arena(plan, threads);
        for (; block < blocks; block = next.fetch_add(1)) {
            const int64_t first = share.first + block * I;
            const Context context{arena.memory, &inputs, &outputs, first,
                                  int(std::min<int64_t>(I, share.first + share.count - first)), 0};
            for (const auto& op : plan.ops)
                for (int chunk = 0; chunk < op->chunks; ++chunk) op->run(chunk, context);
        }
    };
    run_team(int(std::min<int64_t>(threads, blocks)), body);
}

void Session::run_together(const Plan& plan, const Share& share, const std::vector<Images>& inputs,
                           const std::vector<Images>& outputs, int threads) const {
    struct alignas(64) Progress { // of one operation
        std::atomic<int> done{0};
        std::atomic<bool>* taken = nullptr; // of each chunk
    };
    int64_t all = 0;
    for (const auto& op : plan.ops) all += op->chunks;
    Arena arena(plan, threads);
    const int I = share.interleave;
    for (int64_t first = share.first; first < share.first + share.count; first += I) {
        const int count = int(std::min<int64_t>(I, share.first + share.count - first));
        std::vector<Progress> progress(plan.ops.size());
        std::unique_ptr<std::atomic<bool>[]> taken(new std::atomic<bool>[all]());
        std::atomic<bool>* next = taken.get();
        for (size_t n = 0; n < plan.ops.size(); ++n) progress[n].taken = next, next += plan.ops[n]->chunks;
        std::atomic<int> joined{0};
        // Chunks are taken one by one, so a helper that wakes up late joins wherever the others are. Everyone begins
        // with the same part of each operation: neighbouring chunks are neighbouring rows, which are then in its own
        // caches from the operation before.
        const std::function<void()> body = [&] {
            const int rank = joined.fetch_add(1, std::memory_order_relaxed);
            const Context context{arena.memory, &inputs, &outputs, first, count, rank};
            for (size_t n = 0; n < plan.ops.size(); ++n) {
                const Op& op = *plan.ops[n];
                Progress& state = progress[n];
                if (state.done.load(std::memory_order_acquire) == op.chunks) continue;
                const int begin = int(int64_t(op.chunks) * rank / threads);
                for (int i = 0; i < op.chunks; ++i) {
                    const int chunk = (begin + i) % op.chunks;
                    if (state.taken[chunk].load(std::memory_order_relaxed) ||
                        state.taken[chunk].exchange(true, std::memory_order_relaxed))
                        continue;
                    op.run(chunk, context);
                    state.done.fetch_add(1, std::memory_order_release);
                }
                Patience patience;
                while (state.done.load(std::memory_order_acquire) < op.chunks) patience.wait();
            }
        };
        run_team(threads, body);
    }
}

std::vector<Session::Timing> Session::profile(const std::vector<Size>& sizes, const std::vector<Images>& inputs,
                                              const std::vector<Images>& outputs, int images, int interleave,
                                              int repeats) {
    const auto made = plan({sizes, interleave, 1});
    Arena arena(*made, 1);
    const Context context{arena.memory, &inputs, &outputs, 0, std::min(images, interleave), 0};
    std::vector<std::vector<double>> seconds(made->ops.size());
    for (int repeat = 0; repeat < repeats; ++repeat)
        for (size_t n = 0; n < made->ops.size(); ++n) {
            const auto begin = std::chrono::steady_clock::now();
            for (int chunk = 0; chunk < made->ops[n]->chunks; ++chunk) made->ops[n]->run(chunk, context);
            const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
            seconds[n].push_back(passed.count());
        }
    std::vector<Timing> timings;
    for (size_t n = 0; n < made->ops.size(); ++n) {
        std::sort(seconds[n].begin(), seconds[n].end());
        timings.push_back({made->ops[n]->name(), made->ops[n]->made, seconds[n][seconds[n].size() / 2]});
    }
    return timings;
}

int64_t Session::scratch_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = 0;
    for (const auto& plan : plans_) bytes += plan->idle_bytes();
    return bytes;
}

int Session::plan_count() {
    std::lock_guard<std::mutex> lock(mutex_);
    return int(plans_.size());
}

} // namespace dsp
