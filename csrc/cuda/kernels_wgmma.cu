#include "launch.cuh"

namespace dsp {

template void run_wgmma<Half>(const Sizes&, const ConvParams&, int, void*, const std::string&);
template void run_wgmma<Bfloat>(const Sizes&, const ConvParams&, int, void*, const std::string&);

}  // namespace dsp
