// The order in which the warps of a thread block, and the lanes of a warp, run.
#include <algorithm>
#include <numeric>

#include "machine.h"

namespace ptx {

// A block of today's kernels runs some millions.
constexpr uint64_t kMostInstructions = 1'000'000'000;

Block::Block(const Kernel& kernel, const uint8_t* params, uint32_t number, uint32_t blocks, uint32_t threads,
             size_t shared_bytes)
    : kernel_(kernel),
      params_(params),
      number_(number),
      warp_count_(static_cast<int>(threads / 32)),
      memory_(shared_bytes, 0xff),
      units_((shared_bytes + (1u << kernel.unit_bits) - 1) >> kernel.unit_bits),
      warps_(threads / 32) {
    for (int n = 0; n < warp_count_; ++n) {
        Warp& warp = warps_[n];
        warp.id = n;
        warp.narrow.assign(static_cast<size_t>(kernel.narrow) * 32, 0xCDCDCDCDu);
        warp.wide.assign(static_cast<size_t>(kernel.wide) * 32, 0xCDCDCDCDCDCDCDCDull);
        const auto set = [&](int r, uint32_t value) { std::fill_n(&warp.narrow[r * 32], 32, value); };
        set(CTAID, number), set(NTID, threads), set(NCTAID, blocks), set(ZERO, 0);
        std::iota(&warp.narrow[TID * 32], &warp.narrow[TID * 32] + 32, n * 32);
        std::iota(&warp.narrow[LANEID * 32], &warp.narrow[LANEID * 32] + 32, 0);
        for (const auto& constant : kernel.constants32) set(constant.first, constant.second);
        for (const auto& constant : kernel.constants64)
            std::fill_n(&warp.wide[constant.first * 32], 32, constant.second);
        for (const SharedSymbol& symbol : kernel.shared_symbols) {
            const uint32_t address = session().options.shared_base + symbol.offset;
            if (symbol.is_wide) std::fill_n(&warp.wide[symbol.reg * 32], 32, address);
            else set(symbol.reg, address);
        }
        warp.fragments = {{0, 0xffffffffu, false}};
        if (kernel.has_wgmma) warp.in_flight.assign(kernel.narrow, 0), warp.touched.assign(kernel.narrow, 0);
    }
}

void Block::error(const char* kind, const Warp& warp, int lane, const Instruction& i, const string& more) {
    session().error(string(kind) + (more.empty() ? "" : ": " + more) + " | " + i.text + " | block " +
                    std::to_string(number_) + " warp " + std::to_string(warp.id) + " lane " + std::to_string(lane) +
                    " epoch " + std::to_string(warp.epoch) + " | " + kernel_.target + " " + kernel_.name);
}

void Block::run() {
    vector<int> order(warp_count_);
    std::iota(order.begin(), order.end(), 0);
    const int how = session().options.order;
    if (how == 1) std::reverse(order.begin(), order.end());
    while (std::any_of(warps_.begin(), warps_.end(), [](const Warp& warp) { return !warp.fragments.empty(); })) {
        if (release_barrier()) continue;
        if (how == 2)
            for (int n = warp_count_ - 1; n > 0; --n) std::swap(order[n], order[session().below(n + 1)]);
        for (const int n : order) {
            Warp& warp = warps_[n];
            if (warp.fragments.empty() || warp.at_barrier) continue;
            if (!run_warp(warp, how == 2 ? 1 + session().below(200) : ~0ull)) return;
        }
    }
    if (kernel_.has_wgmma) compare_warpgroups();
}

// Lets all warps go on if all that have not ended wait at a barrier.
bool Block::release_barrier() {
    int running = 0, waiting = 0;
    for (const Warp& warp : warps_) running += !warp.fragments.empty(), waiting += warp.at_barrier;
    if (waiting < running) return false;
    if (running < warp_count_) error("barrier after warps ended", warps_[0], 0, kernel_.code[0]);
    for (Warp& warp : warps_)
        if (warp.at_barrier) {
            warp.at_barrier = false;
            ++warp.epoch;
            ++warp.fragments[0].pc;
        }
    return true;
}

static bool needs_all_lanes(Op op) {
    switch (op) {
    case BAR_SYNC:
    case BAR_WARP:
    case SHFL_BFLY:
    case SHFL_IDX:
    case SHFL_UP:
    case SHFL_DOWN:
    case LDMATRIX:
    case LDMATRIX_TRANS:
    case MMA_F16:
    case MMA_BF16:
    case WGMMA_F16:
    case WGMMA_BF16:
    case WGMMA_FENCE:
    case WGMMA_COMMIT:
    case WGMMA_WAIT: return true;
    default: return false;
    }
}

// Runs a warp until it waits at a barrier, has ended, or `budget` instructions are done. False if it cannot go on.
bool Block::run_warp(Warp& warp, uint64_t budget) {
    while (budget--) {
        if (warp.fragments.size() > 1) merge_fragments(warp);
        if (warp.fragments.empty()) return true;
        const int chosen = choose_fragment(warp);
        if (chosen < 0) {
            for (const Fragment& f : warp.fragments)
                error("lanes wait at different aligned instructions", warp, __builtin_ctz(f.mask), kernel_.code[f.pc]);
            return false;
        }
        if (++instructions_ > kMostInstructions) {
            error("endless loop", warp, 0, kernel_.code[warp.fragments[chosen].pc]);
            return false;
        }
        Fragment& fragment = warp.fragments[chosen];
        const Instruction& i = kernel_.code[fragment.pc];
        uint32_t mask = fragment.mask;
        if (i.guard >= 0) {
            mask = 0;
            for (int lane = 0; lane < 32; ++lane)
                mask |= static_cast<uint32_t>((warp.narrow[i.guard * 32 + lane] != 0) != i.negated) << lane;
            mask &= fragment.mask;
        }
        if (i.op == BRA) {
            branch(warp, chosen, mask);
            continue;
        }
        if (i.op == RET && mask == fragment.mask) {
            end(warp, chosen);
            continue;
        }
        if (i.op == RET && mask) {  // some lanes end
            warp.fragments.push_back({fragment.pc + 1, fragment.mask & ~mask, false});
            warp.fragments[chosen].mask = mask;
            end(warp, chosen);
            continue;
        }
        if (needs_all_lanes(i.op)) {
            if (warp.ended) error("aligned instruction after lanes ended", warp, 0, i);
            if ((fragment.mask | warp.ended) != 0xffffffffu) {
                fragment.waits = true;
                continue;
            }
            if (mask != fragment.mask) error("aligned instruction for some lanes", warp, 0, i);
            if (i.op == BAR_SYNC) {
                warp.at_barrier = true;
                return true;
            }
        }
        execute(warp, fragment.pc, mask);
        ++fragment.pc;
    }
    return true;
}

void Block::merge_fragments(Warp& warp) {
    vector<Fragment>& all = warp.fragments;
    for (size_t a = 0; a < all.size(); ++a)
        for (size_t b = a + 1; b < all.size();) {
            if (all[a].pc != all[b].pc) {
                ++b;
                continue;
            }
            all[a].mask |= all[b].mask;
            all[a].waits = false;
            all.erase(all.begin() + static_cast<int64_t>(b));
        }
}

int Block::choose_fragment(const Warp& warp) {
    const vector<Fragment>& all = warp.fragments;
    vector<int> able;
    if (all.size() == 1) return all[0].waits ? -1 : 0;
    for (size_t n = 0; n < all.size(); ++n)
        if (!all[n].waits) able.push_back(static_cast<int>(n));
    if (able.empty()) return -1;
    if (session().options.lanes) return able[session().below(static_cast<uint32_t>(able.size()))];
    return *std::min_element(able.begin(), able.end(), [&](int a, int b) { return all[a].pc < all[b].pc; });
}

void Block::branch(Warp& warp, int number, uint32_t taken) {
    Fragment& fragment = warp.fragments[number];
    const auto target = static_cast<size_t>(kernel_.code[fragment.pc].target);
    const uint32_t rest = fragment.mask & ~taken;
    fragment.pc = rest ? fragment.pc + 1 : target;
    if (!taken || !rest) return;
    fragment.mask = rest;
    warp.fragments.push_back({target, taken, false});
}

void Block::end(Warp& warp, int number) {
    const Fragment& fragment = warp.fragments[number];
    const Instruction& i = kernel_.code[fragment.pc];
    warp.ended |= fragment.mask;
    for (int lane = 0; lane < 32; ++lane)
        if (fragment.mask >> lane & 1 && !warp.copies[lane].empty())
            error("cp.async not waited for at the end", warp, lane, i);
    if (warp.all_in_flight) error("wgmma not waited for at the end", warp, 0, i);
    warp.fragments.erase(warp.fragments.begin() + number);
}

}  // namespace ptx
