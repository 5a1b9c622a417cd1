// What runs a kernel: thread blocks, warps, shared memory, and the rules that are checked on the way.
#pragma once

#include <cstring>
#include <map>
#include <set>
#include <stdexcept>

#include "program.h"

namespace ptx {

struct Options {
    string target = "sm_90a";
    int order = 0;   // of warps: 0 forwards, 1 backwards, 2 in random pieces
    int copies = 0;  // cp.async lands at its wait (0), at its issue (1), or either (2)
    int wgmma = 0;   // happens at its wait (0), at its issue (1), or either (2)
    int lanes = 0;   // of a diverged warp: 0 lowest address first, 1 at random
    int backwards = 0;  // thread blocks
    int shared_limit = 232448;   // bytes of a thread block
    uint32_t shared_base = 1024;  // address of shared memory
};

// Memory that a kernel may use.
struct Region {
    uintptr_t begin, end;
    bool may_read, may_write;
    string name;
    vector<uint8_t> written;  // per byte, where it may be written

    uint64_t unwritten() const;
};

// The state of a launch.
struct Session {
    Options options;
    vector<Region> regions;
    vector<string> errors;
    uint64_t error_count = 0;
    vector<string> launches;  // names of kernels
    uint64_t random = 1;

    uint32_t below(uint32_t count);
    void error(const string& text);
};
Session& session();

// A piece of shared memory, as small as the narrowest access. Epochs count barriers of the block, syncs those of a
// warp.
struct Unit {
    bool is_set = false;
    int32_t writer = -1;  // thread
    uint32_t write_epoch = 0, write_sync = 0;
    uint32_t write_fences = 0;  // proxy fences of the writer before it wrote
    int32_t reader = -1;        // thread, -2: several
    uint32_t read_epoch = 0xffffffff;
    int64_t read_sync = 0;
    int32_t reading_warp = -1;  // -2: several
    int32_t copier = -1;        // thread whose cp.async is under way
    int32_t wgmma_readers = 0;
};

struct Copy {
    uint32_t to;
    const uint8_t* from;
    int bytes, copied;  // the rest is zeros
    uint32_t group;
    bool has_landed;
};

struct Wgmma {
    size_t pc;
    uint64_t a, b;  // descriptors
    bool adds, is_done;
    uint32_t group;
    vector<uint32_t> units;  // of shared memory that it reads
};

// Lanes of a warp that are at the same instruction.
struct Fragment {
    size_t pc;
    uint32_t mask;
    bool waits;  // for the other lanes, at an aligned instruction
};

struct Warp {
    int id;
    vector<uint32_t> narrow;  // [register][lane]
    vector<uint64_t> wide;
    vector<Fragment> fragments;
    uint32_t ended = 0;  // lanes
    uint32_t epoch = 0, syncs = 0;
    vector<Copy> copies[32];
    uint32_t copy_group[32] = {};
    vector<uint32_t> fences[32];  // epoch of each proxy fence
    bool at_barrier = false;
    // Only where the kernel has wgmma: per 32-bit register, how many write it and when anything else did.
    vector<Wgmma> products;
    vector<int> in_flight;
    int all_in_flight = 0;
    vector<uint64_t> touched;
    uint32_t product_group = 0;
    uint64_t now = 1, fenced = 0;
    vector<uint64_t> trace;  // of the products, the same in all warps of a warpgroup
};

class Block {
  public:
    Block(const Kernel& kernel, const uint8_t* params, uint32_t number, uint32_t blocks, uint32_t threads,
          size_t shared_bytes);
    void run();

  private:
    const Kernel& kernel_;
    const uint8_t* params_;
    const uint32_t number_;
    const int warp_count_;
    vector<uint8_t> memory_;
    vector<Unit> units_;
    vector<Warp> warps_;
    uint64_t instructions_ = 0;

    void error(const char* kind, const Warp& warp, int lane, const Instruction& i, const string& more = "");

    // block.cpp: the order of instructions
    bool run_warp(Warp& warp, uint64_t budget);
    void merge_fragments(Warp& warp);
    int choose_fragment(const Warp& warp);
    void branch(Warp& warp, int fragment, uint32_t taken);
    void end(Warp& warp, int fragment);
    bool release_barrier();

    // execute.cpp: one instruction for the lanes of a mask
    void execute(Warp& warp, size_t pc, uint32_t mask);
    void check_registers(Warp& warp, const Instruction& i);
    void shuffle(Warp& warp, const Instruction& i);
    void load_matrix(Warp& warp, const Instruction& i);
    void multiply(Warp& warp, const Instruction& i);

    // memory.cpp
    void access(Warp& warp, int lane, const Instruction& i);
    void load(Warp& warp, int lane, const Instruction& i, const uint8_t* from);
    void store(Warp& warp, int lane, const Instruction& i, uint8_t* to);
    uint32_t first_unit(uint32_t offset) const { return offset >> kernel_.unit_bits; }
    uint32_t last_unit(uint32_t offset, int bytes) const { return (offset + bytes - 1) >> kernel_.unit_bits; }
    string at(uint32_t unit) const { return "offset " + std::to_string(unit << kernel_.unit_bits); }
    bool in_shared(Warp& warp, int lane, const Instruction& i, uint32_t address, int bytes, uint32_t& offset);
    void check_read(Warp& warp, int lane, const Instruction& i, uint32_t offset, int bytes);
    void check_write(Warp& warp, int lane, const Instruction& i, uint32_t offset, int bytes);
    void note_write(Warp& warp, int lane, uint32_t offset, int bytes);
    Region* in_global(Warp& warp, int lane, const Instruction& i, uintptr_t address, int bytes, bool writes);
    void copy(Warp& warp, int lane, const Instruction& i);
    void land(Copy& copy);
    void finish_copies(Warp& warp, int lane, uint32_t before_group);

    // wgmma.cpp
    void issue_wgmma(Warp& warp, size_t pc);
    void check_operands(Warp& warp, const Instruction& i, Wgmma& product);
    void compute(Warp& warp, Wgmma& product);
    void finish_wgmma(Warp& warp, uint32_t before_group);
    void compare_warpgroups();
};

// Runs a grid. Returns a cudaError_t. arguments: a pointer to each parameter.
int launch(const string& kernel, uint32_t blocks, uint32_t threads, size_t dynamic_shared, bool may_have_all_shared,
           void** arguments);
void load_module(const string& text);

float half_to_float(uint32_t bits);
float bfloat_to_float(uint32_t bits);

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

}  // namespace ptx
