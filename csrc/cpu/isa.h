// Which of the compiled instruction sets runs here.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace dsp {

// Names of the instruction sets that this CPU has, best first.
std::vector<std::string> available_isas();

// The kernels of one instruction set; "" takes the best. Throws std::invalid_argument if it is unknown or this
// CPU lacks it.
const Kernels& kernels_for(const std::string& isa);

} // namespace dsp
