"""The native kernels against the op's definition, and the choice of the instruction set."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, reference

from dsp_kernels.env import describe_environment
from dsp_kernels.errors import DSPBackendError
from dsp_kernels.run.cpu.conv import CpuBackend, add_conv
from dsp_kernels.run.cpu.extension import chosen_isa, native, why_missing
from dsp_kernels.tolerances import op_tolerance


def test_the_extension_is_built_if_there_is_a_compiler() -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    assert native() is not None, why_missing()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=lambda case: case.name)
def test_the_op(case: Case, threads: int, isa: str) -> None:
    a = case.tensors()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = CpuBackend().prepare(case.spec, a.weights, a.bias)(a.x, a.residual)
    finally:
        torch.set_num_threads(before)
    expected = reference(case, a)
    assert y.shape == expected.shape
    assert not y.isnan().any()
    error = (y.double() - expected).abs().max().item()
    assert error <= op_tolerance(torch.float32, case.reduction) * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("interleave", [1, 2, 4, 8, 16])
def test_every_interleaving_of_images(isa: str, interleave: int) -> None:
    """17 images are several blocks, or fewer images than a block holds."""
    case = next(case for case in CASES if case.name == "batch 17")
    a = case.tensors()
    network = native().Network(isa)  # type: ignore[union-attr]
    x = network.input(case.structure.in_channels)
    network.output(add_conv(network, case.spec, a.weights, a.bias, x, -1))
    expected = reference(case, a)
    for threads in (1, 3):
        y = torch.full(expected.shape, float("nan"))
        network.run([a.x.numpy()], [y.numpy()], threads, interleave)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_environment_selects_an_instruction_set() -> None:
    """In a process of its own, as a user does it."""
    code = "from dsp_kernels.run.cpu.extension import chosen_isa; print(chosen_isa())"
    environment = {**os.environ, "DSP_KERNELS_ISA": "base", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "base"


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_KERNELS_ISA", "sse17")
    with pytest.raises(DSPBackendError, match="sse17"):
        chosen_isa()


def test_a_bug_report_names_the_instruction_set(use_isa: Callable[[str], None]) -> None:
    use_isa("base")
    assert describe_environment()["native kernels"] == "base"
