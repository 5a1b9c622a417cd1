// wgmma m64n128k16 with both operands in shared memory.
#include <cmath>

#include "machine.h"

namespace ptx {

// Address of the 16-byte piece with element (mn, k) of a 16-bit operand, by the canonical layouts (in pieces):
//   K-major, no swizzle:   ((8,n),2):((1,SBO),LBO)
//   K-major, 128 B:        ((8,n),2):((8,SBO),1)            with Swizzle<3,4,3>
//   MN-major, no swizzle:  ((1,n),(8,k)):((X,SBO),(1,LBO))
//   MN-major, 128 B:       ((8,n),(8,k)):((1,LBO),(8,SBO))  with Swizzle<3,4,3>
static uint32_t piece(uint64_t descriptor, bool mn_major, int mn, int k) {
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t start = field(0), lbo = field(16), sbo = field(32);
    const auto swizzle = descriptor >> 62;
    if (swizzle > 1) throw std::runtime_error("PTX interpreter: swizzle of wgmma");
    if (swizzle == 0) {
        if (mn_major) return start + mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo;
        return start + mn % 8 * 16 + mn / 8 * sbo + k / 8 * lbo;
    }
    const uint32_t address = mn_major ? start + mn / 8 % 8 * 16 + mn / 64 * lbo + k % 8 * 128 + k / 8 * sbo
                                      : start + mn % 8 * 128 + mn / 8 * sbo + k / 8 * 16;
    return address ^ (address >> 3 & 0x70);
}

// Row and column of sum j of a lane.
static int row_of(int j, int lane) { return lane / 4 + j / 2 % 2 * 8; }
static int column_of(int j, int lane) { return j / 4 * 8 + lane % 4 * 2 + j % 2; }

void Block::compute(Warp& warp, Wgmma& product) {
    const Instruction& i = kernel_.code[product.pc];
    const bool transpose_a = i.imm & 1, transpose_b = i.imm & 2;
    static thread_local float a[16][16], b[16][128], d[16][128];
    const auto element = [&](uint64_t descriptor, bool mn_major, int mn, int k) {
        const uint32_t within = static_cast<uint32_t>(mn_major ? mn % 8 : k % 8) * 2;
        const uint32_t offset = piece(descriptor, mn_major, mn, k) + within - session().options.shared_base;
        if (static_cast<uint64_t>(offset) + 2 > memory_.size()) return std::nanf("");
        uint16_t bits;
        memcpy(&bits, &memory_[offset], 2);
        return i.op == WGMMA_F16 ? half_to_float(bits) : bfloat_to_float(bits);
    };
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) a[row][k] = element(product.a, transpose_a, warp.id % 4 * 16 + row, k);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 128; ++n) b[k][n] = element(product.b, transpose_b, n, k);
    for (int j = 0; j < 64; ++j)
        for (int lane = 0; lane < 32; ++lane) {
            const uint32_t before = product.adds ? warp.narrow[i.data[j] * 32 + lane] : 0;
            d[row_of(j, lane)][column_of(j, lane)] = as_float(before);
        }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 128; ++n) d[row][n] += a[row][k] * b[k][n];
    for (int j = 0; j < 64; ++j)
        for (int lane = 0; lane < 32; ++lane)
            warp.narrow[i.data[j] * 32 + lane] = as_bits(d[row_of(j, lane)][column_of(j, lane)]);
    product.is_done = true;
}

void Block::issue_wgmma(Warp& warp, size_t pc) {
    const Instruction& i = kernel_.code[pc];
    const uint64_t* a = &warp.wide[i.a * 32];
    const uint64_t* b = &warp.wide[i.b * 32];
    for (int lane = 1; lane < 32; ++lane)
        if (a[lane] != a[0] || b[lane] != b[0]) {
            error("wgmma descriptors differ between lanes", warp, lane, i);
            break;
        }
    for (const uint64_t descriptor : {a[0], b[0]}) {
        if (descriptor & 0x3ff8c000c000c000ull) error("wgmma descriptor has reserved bits", warp, 0, i);
        if (descriptor >> 49 & 7) error("wgmma base offset is not zero", warp, 0, i);
    }
    warp.trace.push_back(pc * 1000003u ^ a[0] * 7919u ^ b[0] * 104729u);
    Wgmma product{pc, a[0], b[0], warp.narrow[i.c * 32] != 0, false, warp.product_group, {}};
    for (int r : i.data)
        if (warp.touched[r] > warp.fenced) {
            error("wgmma.fence missing: sums written after the last one", warp, 0, i, "register " + std::to_string(r));
            break;
        }
    for (int r : i.data) ++warp.in_flight[r], ++warp.all_in_flight;
    check_operands(warp, i, product);
    const int when = session().options.wgmma;
    const bool may_start = warp.products.empty() || warp.products.back().is_done;
    if (when == 1 || (when == 2 && session().below(2) && may_start)) {
        for (Wgmma& before : warp.products)
            if (!before.is_done) compute(warp, before);
        compute(warp, product);
    }
    warp.products.push_back(std::move(product));
}

// Everything that the warp's product reads has to be written, published and behind a barrier.
void Block::check_operands(Warp& warp, const Instruction& i, Wgmma& product) {
    const bool transpose_a = i.imm & 1, transpose_b = i.imm & 2;
    std::set<uint32_t> pieces;
    for (int k = 0; k < 16; k += transpose_a ? 1 : 8)
        for (int m = 0; m < 16; m += transpose_a ? 8 : 1)
            pieces.insert(piece(product.a, transpose_a, warp.id % 4 * 16 + m, k));
    for (int k = 0; k < 16; k += transpose_b ? 1 : 8)
        for (int n = 0; n < 128; n += transpose_b ? 8 : 1) pieces.insert(piece(product.b, transpose_b, n, k));
    string wrong;
    for (const uint32_t address : pieces) {
        const uint32_t offset = address - session().options.shared_base;
        if (address < session().options.shared_base || static_cast<uint64_t>(offset) + 16 > memory_.size()) {
            wrong = "wgmma reads out of bounds";
            continue;
        }
        for (uint32_t n = first_unit(offset); n <= last_unit(offset, 16); ++n) {
            Unit& unit = units_[n];
            product.units.push_back(n);
            ++unit.wgmma_readers;
            if (unit.copier >= 0) wrong = "wgmma reads under cp.async";
            // Products with rows that nobody stores may read what nobody wrote.
            if (!unit.is_set || unit.writer < 0) continue;
            const bool is_own = unit.writer / 32 == warp.id;
            if (unit.write_epoch == warp.epoch && !is_own) wrong = "race: wgmma reads without a barrier";
            const vector<uint32_t>& fences = warps_[unit.writer / 32].fences[unit.writer % 32];
            const bool is_fenced = fences.size() > unit.write_fences;
            if (!is_fenced || (!is_own && fences[unit.write_fences] >= warp.epoch))
                wrong = "wgmma reads what no fence.proxy.async published";
        }
    }
    if (!wrong.empty()) error(wrong.c_str(), warp, 0, i);
}

void Block::finish_wgmma(Warp& warp, uint32_t before_group) {
    vector<Wgmma> kept;
    for (Wgmma& product : warp.products) {
        if (product.group >= before_group) {
            kept.push_back(std::move(product));
            continue;
        }
        if (!product.is_done) compute(warp, product);
        for (int r : kernel_.code[product.pc].data) --warp.in_flight[r], --warp.all_in_flight;
        for (uint32_t n : product.units) {  // the product read them until now
            Unit& unit = units_[n];
            --unit.wgmma_readers;
            if (unit.read_epoch != warp.epoch)
                unit.reading_warp = warp.id, unit.read_sync = static_cast<int64_t>(warp.syncs) - 1;
            else if (unit.reading_warp != warp.id)
                unit.reading_warp = -2;
            unit.read_epoch = warp.epoch, unit.reader = -2;
        }
    }
    warp.products = std::move(kept);
}

void Block::compare_warpgroups() {
    for (int n = 0; n < warp_count_; ++n)
        if (warps_[n].trace != warps_[n / 4 * 4].trace)
            error("warps of a warpgroup issue different wgmma", warps_[n], 0, kernel_.code[0]);
}

}  // namespace ptx
