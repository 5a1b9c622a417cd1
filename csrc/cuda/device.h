// What the ops ask of this library's own CUDA runtime.
#pragma once

#include <string>

namespace dsp {

// Sets the CUDA runtime's device to that of torch; this library has a runtime of its own. Empty, or why it cannot.
std::string use_device(int device);

}  // namespace dsp
