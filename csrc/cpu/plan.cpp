#include "plan.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace dsp {

bool PlanKey::operator==(const PlanKey& other) const {
    return interleave == other.interleave && threads == other.threads && sizes == other.sizes;
}

namespace {

constexpr size_t huge = size_t(2) << 20;

size_t whole_pages(int64_t floats) { return (size_t(floats) * sizeof(float) + huge - 1) / huge * huge; }

// From the system and back to it: in the heap, blocks of many sizes would leave holes that nothing else fits into.
float* allocate(int64_t floats) {
    const size_t bytes = whole_pages(floats);
    void* const mapped = mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(mapped);
    char* const memory = begin + (huge - reinterpret_cast<uintptr_t>(begin) % huge) % huge;
    if (memory != begin) munmap(begin, memory - begin);
    if (memory != begin + huge) munmap(memory + bytes, begin + huge - memory);
#ifdef MADV_HUGEPAGE
    // Planes lie in different small pages; with huge pages the address translation is never missed.
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<float*>(memory);
}

void release(float* memory, int64_t floats) { munmap(memory, whole_pages(floats)); }

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
    release(arena, arena_floats);
}

int64_t Plan::idle_bytes() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(idle_.size()) * arena_floats * int64_t(sizeof(float));
}

Plan::~Plan() {
    for (float* arena : idle_) release(arena, arena_floats);
}

} // namespace dsp
