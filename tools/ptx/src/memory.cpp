// Loads, stores and asynchronous copies, and what they may not do.
#include <algorithm>

#include "machine.h"

namespace ptx {

static string by(int thread) { return " by thread " + std::to_string(thread); }

void Block::access(Warp& warp, int lane, const Instruction& i) {
    const int bytes = i.width * i.count;
    if (i.op == LD_SHARED || i.op == ST_SHARED) {
        uint32_t offset;
        const uint32_t address = warp.narrow[i.a * 32 + lane] + static_cast<uint32_t>(i.imm);
        if (!in_shared(warp, lane, i, address, bytes, offset)) return;
        if (i.op == LD_SHARED) {
            check_read(warp, lane, i, offset, bytes);
            load(warp, lane, i, &memory_[offset]);
        } else {
            check_write(warp, lane, i, offset, bytes);
            note_write(warp, lane, offset, bytes);
            store(warp, lane, i, &memory_[offset]);
        }
        return;
    }
    const uint64_t address = warp.wide[i.a * 32 + lane] + static_cast<uint64_t>(i.imm);
    if (i.op == LD_PARAM) {
        const uint64_t offset = address - kParamBase;
        if (offset + bytes > static_cast<uint64_t>(kernel_.param_bytes))
            return error("parameter out of bounds", warp, lane, i, std::to_string(offset));
        return load(warp, lane, i, params_ + offset);
    }
    Region* region = in_global(warp, lane, i, address, bytes, i.op == ST_GLOBAL);
    if (i.op == ST_GLOBAL) {
        if (!region) return;
        const auto first = region->written.begin() + static_cast<int64_t>(address - region->begin);
        if (std::any_of(first, first + bytes, [](uint8_t done) { return done; }))
            error("global written twice", warp, lane, i, region->name);
        std::fill(first, first + bytes, 1);
        return store(warp, lane, i, reinterpret_cast<uint8_t*>(address));
    }
    static const uint8_t zeros[16] = {};
    if (!region) return load(warp, lane, i, zeros);
    if (region->may_write) {
        if (i.op == LD_GLOBAL_NC) error("ld.global.nc of memory that the kernel writes", warp, lane, i, region->name);
        const auto first = region->written.begin() + static_cast<int64_t>(address - region->begin);
        if (std::any_of(first, first + bytes, [](uint8_t done) { return done; }))
            error("global read after write", warp, lane, i, region->name);
    }
    load(warp, lane, i, reinterpret_cast<const uint8_t*>(address));
}

void Block::load(Warp& warp, int lane, const Instruction& i, const uint8_t* from) {
    for (int n = 0; n < i.count; ++n) {
        uint64_t value = 0;
        memcpy(&value, from + n * i.width, i.width);
        if (i.is_signed) {
            const int shift = 64 - 8 * i.width;
            value = static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
        }
        if (i.is_wide) warp.wide[i.data[n] * 32 + lane] = value;
        else warp.narrow[i.data[n] * 32 + lane] = static_cast<uint32_t>(value);
    }
}

void Block::store(Warp& warp, int lane, const Instruction& i, uint8_t* to) {
    for (int n = 0; n < i.count; ++n) {
        const int number = i.data[n] * 32 + lane;
        const uint64_t value = i.is_wide ? warp.wide[number] : warp.narrow[number];
        memcpy(to + n * i.width, &value, i.width);
    }
}

// ---- shared memory

bool Block::in_shared(Warp& warp, int lane, const Instruction& i, uint32_t address, int bytes, uint32_t& offset) {
    offset = address - session().options.shared_base;
    if (address < session().options.shared_base || static_cast<uint64_t>(offset) + bytes > memory_.size()) {
        error("shared out of bounds", warp, lane, i,
              "offset " + std::to_string(static_cast<int32_t>(offset)) + " of " + std::to_string(memory_.size()));
        return false;
    }
    if (address % bytes) {
        error("shared misaligned", warp, lane, i, "offset " + std::to_string(offset));
        return false;
    }
    return true;
}

void Block::check_read(Warp& warp, int lane, const Instruction& i, uint32_t offset, int bytes) {
    const int thread = warp.id * 32 + lane;
    for (uint32_t n = first_unit(offset); n <= last_unit(offset, bytes); ++n) {
        Unit& unit = units_[n];
        if (unit.copier >= 0) error("read under cp.async", warp, lane, i, at(n) + by(unit.copier));
        if (!unit.is_set) error("uninitialised shared read", warp, lane, i, at(n));
        const bool by_own_warp = unit.writer / 32 == warp.id && unit.write_sync < warp.syncs;
        if (unit.writer >= 0 && unit.writer != thread && unit.write_epoch == warp.epoch && !by_own_warp)
            error("race: read after write", warp, lane, i, at(n) + by(unit.writer));
        if (unit.read_epoch != warp.epoch) {
            unit.reader = thread, unit.reading_warp = warp.id;
            unit.read_epoch = warp.epoch, unit.read_sync = warp.syncs;
        } else {
            if (unit.reader != thread) unit.reader = -2;
            if (unit.reading_warp != warp.id) unit.reading_warp = -2;
            unit.read_sync = std::max<int64_t>(unit.read_sync, warp.syncs);
        }
    }
}

void Block::check_write(Warp& warp, int lane, const Instruction& i, uint32_t offset, int bytes) {
    const int thread = warp.id * 32 + lane;
    for (uint32_t n = first_unit(offset); n <= last_unit(offset, bytes); ++n) {
        const Unit& unit = units_[n];
        if (unit.copier >= 0) error("write under cp.async", warp, lane, i, at(n) + by(unit.copier));
        if (unit.wgmma_readers > 0) error("write under wgmma", warp, lane, i, at(n));
        const bool by_own_warp = unit.writer / 32 == warp.id && unit.write_sync < warp.syncs;
        if (unit.writer >= 0 && unit.writer != thread && unit.write_epoch == warp.epoch && !by_own_warp)
            error("race: write after write", warp, lane, i, at(n) + by(unit.writer));
        const bool read_by_own_warp = unit.reading_warp == warp.id && unit.read_sync < static_cast<int64_t>(warp.syncs);
        if (unit.read_epoch == warp.epoch && unit.reader != thread && !read_by_own_warp)
            error("race: write after read", warp, lane, i, at(n) + by(unit.reader));
    }
}

void Block::note_write(Warp& warp, int lane, uint32_t offset, int bytes) {
    for (uint32_t n = first_unit(offset); n <= last_unit(offset, bytes); ++n) {
        Unit& unit = units_[n];
        unit.writer = warp.id * 32 + lane, unit.write_epoch = warp.epoch, unit.write_sync = warp.syncs;
        unit.write_fences = static_cast<uint32_t>(warp.fences[lane].size());
        unit.is_set = true;
    }
}

// ---- global memory

Region* Block::in_global(Warp& warp, int lane, const Instruction& i, uintptr_t address, int bytes, bool writes) {
    vector<Region>& regions = session().regions;
    const auto region = std::find_if(regions.begin(), regions.end(), [&](const Region& r) {
        return address >= r.begin && address + bytes <= r.end;
    });
    if (region == regions.end()) {
        string near;
        for (const Region& r : regions)
            if (address + 65536 > r.begin && address < r.end + 65536)
                near += " " + r.name + "[" + std::to_string(static_cast<int64_t>(address - r.begin)) + " of " +
                        std::to_string(r.end - r.begin) + "]";
        error(writes ? "global write out of bounds" : "global read out of bounds", warp, lane, i, "near" + near);
        return nullptr;
    }
    if (address % bytes) {
        error("global misaligned", warp, lane, i, region->name + " offset " + std::to_string(address - region->begin));
        return nullptr;
    }
    if (writes ? !region->may_write : !region->may_read) {
        error(writes ? "write to read-only memory" : "read of write-only memory", warp, lane, i, region->name);
        if (writes) return nullptr;
    }
    return &*region;
}

uint64_t Region::unwritten() const { return static_cast<uint64_t>(std::count(written.begin(), written.end(), 0)); }

// ---- cp.async

void Block::copy(Warp& warp, int lane, const Instruction& i) {
    const uint32_t to = warp.narrow[i.a * 32 + lane] + static_cast<uint32_t>(i.imm);
    const uintptr_t from = warp.wide[i.b * 32 + lane];
    const int copied = i.c >= 0 ? static_cast<int>(warp.narrow[i.c * 32 + lane]) : i.width;
    uint32_t offset;
    if (!in_shared(warp, lane, i, to, i.width, offset)) return;
    if (copied < 0 || copied > i.width) return error("cp.async size", warp, lane, i, std::to_string(copied));
    if (from % i.width) return error("global misaligned", warp, lane, i, "source of cp.async");
    if (copied && !in_global(warp, lane, i, from, copied, false)) return;
    check_write(warp, lane, i, offset, i.width);
    for (uint32_t n = first_unit(offset); n <= last_unit(offset, i.width); ++n) units_[n].copier = warp.id * 32 + lane;
    Copy made{offset, reinterpret_cast<const uint8_t*>(from), i.width, copied, warp.copy_group[lane], false};
    const int when = session().options.copies;
    if (when == 1 || (when == 2 && session().below(2))) land(made);
    warp.copies[lane].push_back(made);
}

void Block::land(Copy& copy) {
    if (copy.has_landed) return;
    uint8_t* to = &memory_[copy.to];
    memcpy(to, copy.from, copy.copied);
    memset(to + copy.copied, 0, copy.bytes - copy.copied);
    copy.has_landed = true;
}

void Block::finish_copies(Warp& warp, int lane, uint32_t before_group) {
    vector<Copy>& copies = warp.copies[lane];
    size_t kept = 0;
    for (Copy& copy : copies) {
        if (copy.group >= before_group) {
            copies[kept++] = copy;
            continue;
        }
        land(copy);
        for (uint32_t n = first_unit(copy.to); n <= last_unit(copy.to, copy.bytes); ++n) units_[n].copier = -1;
        note_write(warp, lane, copy.to, copy.bytes);
    }
    copies.resize(kept);
}

}  // namespace ptx
