// Which two channels stand in one word, for convolutions in bfloat16.
#pragma once

#include <vector>

namespace dsp {

// groups: the channels that each group reads. Returns for each group its channels in an order in which every two
// neighbours, the 1st and 2nd, 3rd and 4th and so on, make a pair, such that groups share many pairs: a plane of
// words is made once per pair. Depends on the sets of channels only, not on their order.
std::vector<std::vector<int>> pair_channels(const std::vector<std::vector<int>>& groups);

} // namespace dsp
