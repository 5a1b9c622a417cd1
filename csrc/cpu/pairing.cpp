#include "pairing.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <utility>

namespace dsp {

namespace {

constexpr int64_t most_candidates = 1 << 18; // about 50 ms to sort

// Pairs of the channels that are left in the groups, those that most groups have first.
std::vector<std::pair<int, int>> candidates(const std::vector<std::set<int>>& left) {
    int64_t total = 0;
    for (const auto& group : left) total += int64_t(group.size()) * int64_t(group.size()) / 2;
    if (total > most_candidates) return {};
    std::map<std::pair<int, int>, int> shared;
    for (const auto& group : left)
        for (auto a = group.begin(); a != group.end(); ++a)
            for (auto b = std::next(a); b != group.end(); ++b) ++shared[{*a, *b}];
    std::vector<std::pair<int, int>> pairs;
    for (const auto& entry : shared) pairs.push_back(entry.first);
    std::stable_sort(pairs.begin(), pairs.end(),
                     [&](const auto& a, const auto& b) { return shared.at(a) > shared.at(b); });
    return pairs;
}

} // namespace

std::vector<std::vector<int>> pair_channels(const std::vector<std::vector<int>>& groups) {
    std::map<int, std::vector<int>> readers; // of each channel
    std::vector<std::set<int>> left;
    for (size_t g = 0; g < groups.size(); ++g) {
        left.emplace_back(groups[g].begin(), groups[g].end());
        for (int c : left.back()) readers[c].push_back(int(g));
    }
    std::vector<std::vector<int>> order(groups.size());
    const auto take = [&](int a, int b) {
        for (size_t g = 0; g < left.size(); ++g)
            if (left[g].count(a) && left[g].count(b)) {
                order[g].insert(order[g].end(), {a, b});
                left[g].erase(a), left[g].erase(b);
            }
    };
    // Channels that the very same groups read share all their planes.
    std::map<std::vector<int>, int> waiting;
    for (const auto& entry : readers) {
        const auto partner = waiting.find(entry.second);
        if (partner == waiting.end()) {
            waiting[entry.second] = entry.first;
        } else {
            take(partner->second, entry.first);
            waiting.erase(partner);
        }
    }
    for (const auto& pair : candidates(left)) take(pair.first, pair.second);
    for (size_t g = 0; g < left.size(); ++g) order[g].insert(order[g].end(), left[g].begin(), left[g].end());
    return order;
}

} // namespace dsp
