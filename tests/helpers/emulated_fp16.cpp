// The float16 kernels by emulated instructions, for CPUs without AVX512-FP16. compiled.py builds an extension with this
// file in place of csrc/cpu/kernels/*.cpp.
#define DSP_LANES 8
#define DSP_WIDE 1 // tiles for 32 registers, which this CPU spills
#define DSP_FP16 1
#define DSP_TABLE kernels_emulated
#include <immintrin.h>

#include "kernels/impl.h"

#include "network.h"

#include <stdexcept>

namespace dsp {

std::vector<std::string> available_isas() { return {"emulated_fp16"}; }

const Kernels& kernels_for(const std::string& isa) {
    if (!isa.empty() && isa != "emulated_fp16")
        throw std::invalid_argument("instruction set '" + isa + "' is not in this build");
    return kernels_emulated();
}

} // namespace dsp
