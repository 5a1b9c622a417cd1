"""The instruction sets on which tests run the CPU kernels."""

import os

from compiled import EMULATED, why_not_emulated

from dsp_kernels.run.cpu.extension import native

__all__ = ["FP16_ISAS", "ISAS", "WORD_ISAS"]

_MODULE = native()
_AVAILABLE: list[str] = _MODULE.available_isas() if _MODULE else []
_ALL = os.environ.get("DSP_TEST_ALL_ISAS") == "1"
_EMULATED = [isa for isa in EMULATED if not why_not_emulated(isa)]
# The best and the base instruction set of this CPU; all of them with DSP_TEST_ALL_ISAS=1 (make test-all).
ISAS = _AVAILABLE if _ALL else list(dict.fromkeys([*_AVAILABLE[:1], *_AVAILABLE[-1:]]))
# Those that multiply float16, or their emulation.
FP16_ISAS = [isa for isa in _AVAILABLE if "float16" in _MODULE.own_products(isa)]
FP16_ISAS += [isa for isa in _EMULATED if isa == "emulated_fp16" and (_ALL or not FP16_ISAS)]
# Those of ISAS, and AMX emulated, where every convolution that can multiplies matrices.
WORD_ISAS = [*ISAS, *(isa for isa in _EMULATED if isa.endswith("_amx"))]
