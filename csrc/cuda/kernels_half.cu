#include "launch.cuh"

namespace dsp {

template void run_16bit<Half>(const Sizes&, const ConvParams&, int, void*, const std::string&);
template void run_block<Half>(const BlockSizes&, const BlockLaunch&, int, void*, const std::string&);

}  // namespace dsp
