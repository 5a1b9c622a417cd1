"""The instruction sets on which tests run the CPU kernels."""

import os

from compiled import EMULATED_ISA, why_no_emulated_fp16

from dsp_kernels.run.cpu.extension import native

__all__ = ["FP16_ISAS", "ISAS"]

_MODULE = native()
_AVAILABLE: list[str] = _MODULE.available_isas() if _MODULE else []
_ALL = os.environ.get("DSP_TEST_ALL_ISAS") == "1"
# The best and the base instruction set of this CPU; all of them with DSP_TEST_ALL_ISAS=1 (make test-all).
ISAS = _AVAILABLE if _ALL else list(dict.fromkeys([*_AVAILABLE[:1], *_AVAILABLE[-1:]]))
# Those that multiply float16, or their emulation.
FP16_ISAS = [isa for isa in _AVAILABLE if isa == "avx512_fp16"]
if not why_no_emulated_fp16() and (_ALL or not FP16_ISAS):
    FP16_ISAS.append(EMULATED_ISA)
