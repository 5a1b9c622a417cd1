#include "plan.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace dsp {

bool PlanKey::operator==(const PlanKey& other) const {
    return interleave == other.interleave && threads == other.threads && sizes == other.sizes;
}

namespace {

constexpr size_t huge = size_t(2) << 20;

float* allocate(int64_t floats) {
    // Planes lie in different small pages; with huge pages the address translation is never missed.
    const size_t bytes = (size_t(floats) * sizeof(float) + huge - 1) / huge * huge;
    void* memory = std::aligned_alloc(huge, bytes);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<float*>(memory);
}

} // namespace

float* Plan::take_arena() const {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!idle_.empty()) {
            float* arena = idle_.back();
            idle_.pop_back();
            return arena;
        }
    }
    return allocate(arena_floats);
}

void Plan::give_arena(float* arena, int keep) const {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (int(idle_.size()) < keep) {
            idle_.push_back(arena);
            return;
        }
    }
    std::free(arena);
}

int64_t Plan::idle_bytes() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(idle_.size()) * arena_floats * int64_t(sizeof(float));
}

Plan::~Plan() {
    for (float* arena : idle_) std::free(arena);
}

} // namespace dsp
