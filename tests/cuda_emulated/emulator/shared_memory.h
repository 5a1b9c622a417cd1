// A block's shared memory on the host, which watches how it is used. It starts as NaN. Accesses of a warp are collected
// per instruction and their bank conflicts counted. An access of a word that another thread wrote, or a store to one
// that another thread read, since the last barrier is an error. What was stored and not published is remembered: wgmma
// may not see it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace dsp {

struct Counts {
    int64_t matrices = 0, matrix_conflicts = 0;  // accesses of a quarter warp, and the extra turns they took
    int64_t copies = 0, copy_conflicts = 0;
    int64_t stores = 0, store_conflicts = 0;
    int64_t loads = 0, load_conflicts = 0;
};

// What an instruction does with shared memory.
enum class Kind { matrix, copy, store, load };

class SharedMemory {
public:
    SharedMemory(int threads, int bytes, Counts& counts)
        : counts(counts), memory(bytes, '\xff'), unpublished(bytes), issued(threads),
          uses((bytes + 3) / 4) {}

    void read(Kind kind, int thread, int offset, int size, void* value) {
        note(kind, thread, offset, size);
        watch_read(thread, offset, size);
        std::memcpy(value, at(offset, size), size);
    }
    void store(int thread, int offset, int size, const void* value) {
        note(Kind::store, thread, offset, size);
        put(thread, offset, size, value);
    }
    // An asynchronous copy: its start, the bytes that are invalid until it has landed, and its landing.
    void begin_copy(int thread, int offset, int size) { note(Kind::copy, thread, offset, size); }
    void spoil(int offset, int size) { std::memset(at(offset, size), 0xff, size); }
    void put(int thread, int offset, int size, const void* value) {
        watch_write(thread, offset, size);
        std::memcpy(at(offset, size), value, size);
        std::fill_n(unpublished.begin() + offset, size, true);
    }
    // As wgmma reads it; false where that is not published.
    bool read_published(int offset, uint16_t& bits) {
        watch_read(kProducts, offset / 4 * 4, 4);
        std::memcpy(&bits, at(offset, 2), 2);
        return !unpublished[offset];
    }
    void publish() { std::fill(unpublished.begin(), unpublished.end(), false); }
    void sync() { ++barriers; }

    // Ends what the threads did side by side: counts the conflicts of every instruction.
    void flush() {
        for (const auto& [key, accesses] : pending) {
            const auto& [kind, place, number] = key;
            const int size = place % 64;
            std::array<std::vector<int>, 32> words;  // distinct words wanted from each bank
            for (const Access& a : accesses)
                for (int w = a.offset / 4; w < (a.offset + size) / 4; ++w) {
                    auto& bank = words[w % 32];
                    bool known = false;
                    for (const int other : bank) known |= other == w;
                    if (!known) bank.push_back(w);
                }
            size_t turns = 1;
            for (const auto& bank : words) turns = bank.size() > turns ? bank.size() : turns;
            const int64_t extra = static_cast<int64_t>(turns) - 1;
            switch (kind) {
                case Kind::matrix: ++counts.matrices, counts.matrix_conflicts += extra; break;
                case Kind::copy: ++counts.copies, counts.copy_conflicts += extra; break;
                case Kind::store: ++counts.stores, counts.store_conflicts += extra; break;
                case Kind::load: ++counts.loads, counts.load_conflicts += extra;
            }
        }
        pending.clear();
        std::fill(issued.begin(), issued.end(), 0);
    }

private:
    struct Access {
        int lane, offset;
    };
    static constexpr int kProducts = -3;  // wgmma, which is no thread
    // Of one word: the thread that wrote it and the one that read it, and since which barrier; -2: several threads.
    struct Use {
        int writer = -1, written = -1, reader = -1, read = -1;
    };

    Counts& counts;
    std::vector<char> memory;
    std::vector<bool> unpublished;  // bytes that wgmma may not see yet
    // kind and instruction of a warp -> its lanes' accesses
    std::map<std::tuple<Kind, int, int>, std::vector<Access>> pending;
    std::vector<int> issued;
    std::vector<Use> uses;
    int barriers = 0;

    char* at(int offset, int size) {
        if (offset < 0 || offset % size || offset + size > static_cast<int>(memory.size()))
            throw std::runtime_error("shared memory: " + std::to_string(size) + " bytes at " + std::to_string(offset) +
                                     " of " + std::to_string(memory.size()));
        return memory.data() + offset;
    }
    void watch_read(int thread, int offset, int size) {
        for (int i = offset / 4; i < (offset + size) / 4; ++i) {
            Use& use = uses.at(i);
            if (use.written == barriers && use.writer != thread)
                throw std::runtime_error("a race: shared memory is read before a barrier after its store");
            use.reader = use.read == barriers && use.reader != thread ? -2 : thread;
            use.read = barriers;
        }
    }
    void watch_write(int thread, int offset, int size) {
        for (int i = offset / 4; i < (offset + size) / 4; ++i) {
            Use& use = uses.at(i);
            if ((use.read == barriers && use.reader != thread) || (use.written == barriers && use.writer != thread))
                throw std::runtime_error("a race: shared memory is stored to before a barrier after its last use");
            use.writer = thread;
            use.written = barriers;
        }
    }
    // `size` bytes per lane: 16 bytes go in quarter warps, 8 in halves, 4 in whole warps.
    void note(Kind kind, int thread, int offset, int size) {
        const int lanes = 128 / size;
        pending[{kind, (thread / lanes) * 64 + size, issued[thread]++}].push_back({thread, offset});
    }
};

}  // namespace dsp
