// A block of threads on the host, for the kernel templates of csrc/cuda. Threads run one after another between two
// barriers. Asynchronous copies land either at once or at the wait that needs them, and threads run in either order,
// so a kernel that reads or overwrites a stage too early gives a wrong answer in one of the modes. A copy counts as a
// store by its thread where it lands.
// Products of a warpgroup are computed at once in the mode with late copies, otherwise as late as allowed, so that an
// operand that is overwritten too early gives a wrong answer.
#pragma once

#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/wgmma.h"
#include "shared_memory.h"

namespace dsp {

struct Modes {
    bool late_copies;
    bool backwards;
};

struct Range {  // memory that the kernel may touch
    const char* begin;
    const char* end;
    bool writable;
};

struct HostMachine {
    template <class V>
    struct PerThread {
        std::vector<V> values = std::vector<V>(1024);
        V& operator[](int i) { return values[i]; }
    };
    template <class V>
    struct PerWarp {
        std::vector<V> values = std::vector<V>(32);
        V& operator[](int i) { return values[i]; }
    };
    template <class V>
    struct PerLane {
        V values[32];
        V& operator[](int i) { return values[i]; }
    };
    struct Quad {
        uint32_t word[4][32];
    };
    struct Acc {
        float value[4][32];
    };
    struct Copy {
        int offset;
        std::array<char, 16> bytes;
        int size, thread;
    };

    int threads;
    Modes modes;
    const std::vector<Range>& ranges;
    SharedMemory shared;
    std::vector<std::vector<Copy>> groups;  // of copies on their way; the last is open
    std::vector<std::vector<std::function<void()>>> products;  // the same of a warpgroup's products

    HostMachine(int threads, int shared_bytes, Modes modes, Counts& counts, const std::vector<Range>& ranges)
        : threads(threads), modes(modes), ranges(ranges), shared(threads, shared_bytes, counts), groups(1),
          products(1) {}

    template <class F>
    void each_thread(F f) {
        for (int i = 0; i < threads; ++i) f(modes.backwards ? threads - 1 - i : i);
        shared.flush();
    }
    template <class F>
    void each_warp(F f) {
        for (int i = 0; i < threads / 32; ++i) f(modes.backwards ? threads / 32 - 1 - i : i);
        shared.flush();
    }
    template <class F>
    void each_lane(int, F f) {
        for (int lane = 0; lane < 32; ++lane) f(lane);
    }
    void sync() { shared.sync(); }

    void copy16(int thread, int offset, const Vec16* source, bool inside) { copy(thread, offset, source, inside, 16); }
    void copy4(int thread, int offset, const float* source, bool inside) { copy(thread, offset, source, inside, 4); }
    void commit() { groups.emplace_back(); }
    template <int GROUPS>
    void wait() {
        const int done = static_cast<int>(groups.size()) - 1 - GROUPS;
        for (int g = 0; g < done; ++g) {
            for (const Copy& c : groups[g]) shared.put(c.thread, c.offset, c.size, c.bytes.data());
            groups[g].clear();
        }
    }

    template <class V>
    V read(const V* source) {
        check(source, sizeof(V), false);
        return *source;
    }
    template <class V>
    V read_residual(const V* source) {
        return read(source);
    }
    template <class V>
    void write(V* target, const V& value) {
        check(target, sizeof(V), true);
        *target = value;
    }

    void store_one(int thread, int offset, float v) { shared.store(thread, offset, 4, &v); }
    void store_two(int thread, int offset, float a, float b) {
        const float both[2] = {a, b};
        shared.store(thread, offset, 8, both);
    }
    void store16(int thread, int offset, const Vec16& v) { shared.store(thread, offset, 16, &v); }
    void store_word(int thread, int offset, uint32_t v) { shared.store(thread, offset, 4, &v); }
    Vec16 load16(int thread, int offset) {
        Vec16 v;
        shared.read(Kind::load, thread, offset, 16, &v);
        return v;
    }
    void load_four(int thread, int offset, float (&v)[4]) {
        shared.read(Kind::load, thread, offset, 16, v);
    }
    template <class Address>
    void load_fragment(int warp, Quad& q, Address address) {
        for (int lane = 0; lane < 32; ++lane) {
            const Vec16 all = load16(warp * 32 + lane, address(lane));
            for (int i = 0; i < 4; ++i) q.word[i][lane] = all.word[i];
        }
    }
    void read_fragment(int, Quad& q, const Vec16* base) {
        for (int lane = 0; lane < 32; ++lane) {
            const Vec16 all = read(base + lane);
            for (int i = 0; i < 4; ++i) q.word[i][lane] = all.word[i];
        }
    }
    void converge() {}
    void exchange(int, PerLane<float>& v, int bit) {
        const PerLane<float> before = v;
        for (int lane = 0; lane < 32; ++lane) v.values[lane] = before.values[lane ^ bit];
    }
    // PTX ISA, ldmatrix: matrix i has its rows at the addresses of lanes 8i to 8i + 7; lane l gets the elements
    // 2 * (l % 4) and the next one of row l / 4, or with .trans of column l / 4.
    template <bool TRANSPOSED, class Address>
    void load_matrices(int warp, Quad& q, Address address) {
        uint16_t matrix[4][8][8];
        for (int lane = 0; lane < 32; ++lane)
            shared.read(Kind::matrix, warp * 32 + lane, address(lane), 16, matrix[lane / 8][lane % 8]);
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < 32; ++lane) {
                uint32_t word = 0;
                for (int e = 0; e < 2; ++e) {
                    const int minor = lane % 4 * 2 + e, major = lane / 4;
                    word |= static_cast<uint32_t>(TRANSPOSED ? matrix[i][minor][major] : matrix[i][major][minor])
                            << (16 * e);
                }
                q.word[i][lane] = word;
            }
    }
    // PTX ISA, fragments of mma.m16n8k16: A has row l / 4 (+ 8 in registers 1 and 3), columns 2 * (l % 4) + {0, 1}
    // (+ 8 in registers 2 and 3); B has rows 2 * (l % 4) + {0, 1} (+ 8 in register 1), column l / 4; C has row l / 4
    // (+ 8 in elements 2 and 3), columns 2 * (l % 4) + {0, 1}.
    template <class T>
    void multiply(Acc& acc, const Quad& a, const Quad& b, int first) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            for (int r = 0; r < 4; ++r)
                for (int e = 0; e < 2; ++e)
                    left[lane / 4 + r % 2 * 8][lane % 4 * 2 + e + r / 2 * 8] = half_of<T>(a.word[r][lane], e);
            for (int r = 0; r < 2; ++r)
                for (int e = 0; e < 2; ++e)
                    right[lane % 4 * 2 + e + r * 8][lane / 4] = half_of<T>(b.word[first + r][lane], e);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 4; ++e) {
                const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
                float sum = acc.value[e][lane];
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                acc.value[e][lane] = sum;
            }
    }
    template <class F>
    void each_warpgroup(F f) {
        for (int i = 0; i < threads / 128; ++i) f(modes.backwards ? threads / 128 - 1 - i : i);
    }
    void publish() { shared.publish(); }
    void begin_products() {}
    void commit_products() {
        if (++open_products % (threads / 128) == 0) products.emplace_back();  // every warpgroup's group
    }
    template <int GROUPS, class S>
    void wait_products(S&) {
        const int done = static_cast<int>(products.size()) - 1 - GROUPS;
        for (int g = 0; g < done; ++g) {
            for (const auto& product : products[g]) product();
            products[g].clear();
        }
    }
    // PTX ISA, wgmma.mma_async: 64 x 16 times 16 x 8 NT; warp w of the warpgroup holds rows 16 w to 16 w + 15 as in
    // mma.m16n8k16. The operands are read through their descriptors.
    template <class T, class S, class A, class B>
    void multiply_warpgroup(S& sums, int group, const A& left, const B& right) {
        constexpr int kWidth = 8 * sizeof(sums[0].at[0]) / sizeof(sums[0].at[0][0]);
        const uint64_t a = descriptor_of(left, kSharedAddress), b = descriptor_of(right, kSharedAddress);
        const auto product = [this, &sums, group, a, b] {
            std::vector<float> rows(64 * 16), columns(16 * kWidth);
            for (int k = 0; k < 16; ++k) {
                for (int i = 0; i < 64; ++i) rows[i * 16 + k] = element<T>(a, A::order, i, k);
                for (int i = 0; i < kWidth; ++i) columns[k * kWidth + i] = element<T>(b, B::order, i, k);
            }
            for (int warp = 0; warp < 4; ++warp)
                for (int j = 0; j < kWidth / 8; ++j)
                    for (int e = 0; e < 4; ++e)
                        for (int lane = 0; lane < 32; ++lane) {
                            const int row = warp * 16 + lane / 4 + e / 2 * 8, column = j * 8 + lane % 4 * 2 + e % 2;
                            float& sum = sums[group * 4 + warp].at[0][j].value[e][lane];
                            for (int k = 0; k < 16; ++k) sum += rows[row * 16 + k] * columns[k * kWidth + column];
                        }
        };
        if (modes.late_copies)
            product();
        else
            products.back().push_back(product);
    }
    static void clear(Acc& acc) { std::memset(&acc, 0, sizeof acc); }
    static float get(const Acc& acc, int element, int lane) { return acc.value[element][lane]; }
    static float as_float(uint32_t word) { return reinterpret<float>(word); }
    static uint32_t as_word(float value) { return reinterpret<uint32_t>(value); }

private:
    static constexpr uint32_t kSharedAddress = 1024;  // where a GPU's first block of shared memory starts
    int open_products = 0;

    // A number of an operand. PTX ISA, "Shared Memory Matrix Layout" and "Matrix Descriptor"; see wgmma.h.
    template <class T>
    float element(uint64_t descriptor, Order order, int mn, int k) {
        const auto bytes = [&](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) * 16; };
        const int start = bytes(0), lead = bytes(16), stride = bytes(32);
        const bool swizzled = descriptor >> 62 == 1;
        if (swizzled != (order == Order::swizzled) || (swizzled && start % 1024))
            throw std::runtime_error("a descriptor does not fit its operand");
        int address = start;
        if (order == Order::along_k) address += mn / 8 * stride + mn % 8 * 16 + k / 8 * lead + k % 8 * 2;
        if (order == Order::along_mn) address += mn / 8 * stride + mn % 8 * 2 + k / 8 * lead + k % 8 * 16;
        if (order == Order::swizzled) address += mn / 64 * lead + mn % 64 * 2 + k / 8 * stride + k % 8 * 128;
        if (swizzled) address ^= address >> 3 & 0x70;
        uint16_t bits;
        const bool published = shared.read_published(address - static_cast<int>(kSharedAddress), bits);
        return published ? T::widen(bits) : std::nanf("");
    }
    template <class T>
    static float half_of(uint32_t word, int e) {
        return T::widen(static_cast<uint16_t>(word >> (16 * e)));
    }
    void check(const void* address, int size, bool write) {
        const char* p = static_cast<const char*>(address);
        if (reinterpret_cast<uintptr_t>(p) % size) throw std::runtime_error("an access is not aligned");
        for (const Range& r : ranges)
            if (p >= r.begin && p + size <= r.end && (r.writable || !write)) return;
        throw std::runtime_error(write ? "a store outside of the output" : "a load outside of every tensor");
    }
    void copy(int thread, int offset, const void* source, bool inside, int size) {
        shared.begin_copy(thread, offset, size);
        Copy c{offset, {}, size, thread};
        if (inside) {
            check(source, size, false);
            std::memcpy(c.bytes.data(), source, size);
        }
        if (modes.late_copies) {
            shared.spoil(offset, size);
            groups.back().push_back(c);
        } else {
            shared.put(thread, offset, size, c.bytes.data());
        }
    }
};

}  // namespace dsp
