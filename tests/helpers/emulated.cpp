// The table of instruction sets of an extension whose kernels are emulated, in place of csrc/cpu/kernels/isa.cpp.
#include "network.h"

#include <stdexcept>

namespace dsp {

const Kernels& kernels_emulated_fp16();
const Kernels& kernels_emulated_amx();

std::vector<std::string> available_isas() { return {"emulated_fp16", "emulated_amx"}; }

const Kernels& kernels_for(const std::string& isa) {
    if (isa == "emulated_amx") return kernels_emulated_amx();
    if (isa == "emulated_fp16") return kernels_emulated_fp16();
    throw std::invalid_argument("instruction set '" + isa + "' is not in this build");
}

} // namespace dsp
