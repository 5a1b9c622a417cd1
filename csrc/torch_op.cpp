// The schema of the torch op, registered through LibTorch's stable ABI, so that one build loads on several versions
// of torch. The build passes the text of dsp_kernels/op/torch_op.py. What runs the op is registered from Python
// (dsp_kernels/op/torch_op.py): an error that passes through this ABI loses its type.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(dsp_kernels, m) { m.def(DSP_OP_NAME DSP_OP_SCHEMA); }
