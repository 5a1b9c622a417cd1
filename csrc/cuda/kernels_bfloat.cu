#include "launch.cuh"

namespace dsp {

template void run_16bit<Bfloat>(const Sizes&, const ConvParams&, int, void*, const std::string&);
template void run_block<Bfloat>(const BlockSizes&, const BlockLaunch&, int, void*, const std::string&);

}  // namespace dsp
