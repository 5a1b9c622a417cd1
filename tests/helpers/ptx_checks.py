"""Convolutions and blocks whose kernels run as PTX in tools/ptx, against the definition."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from block_cases import BlockCase
from cases import Case
from golden import cifar_images
from gpu_checks import check_block, check_conv, layer_of, solved, solved_block
from ptx.build import build
from ptx.interpreter import Interpreter
from torch import Tensor, nn

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPBackendError
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.program.planner import plan
from dsp_kernels.run.gpu.cuda import conv as cuda_conv
from dsp_kernels.run.gpu.cuda.blocks import conv as block_conv
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.cuda.conv import CudaConv
from dsp_kernels.run.gpu.cuda.launch import launch_op
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.program import GpuRunner
from dsp_kernels.run.gpu.tune import Choices, Tuner
from dsp_pruning import read_released

CPU = torch.device("cpu")
CHIPS = ("sm_80", "sm_90a")


def layout_of(kernel: str) -> GpuLayout:
    return GpuLayout.NHWC if "nhwc" in kernel else GpuLayout.CHWN


def interpreters(chips: Sequence[str], shared_limit: int | None = None) -> Iterator[Interpreter]:
    """Every order of warps, copies and blocks on the first chip; a random one on the others."""
    for chip in chips:
        for name, order in Interpreter.ORDERS.items():
            if chip == chips[0] or name == "random":
                yield Interpreter(chip, **order, shared_limit=shared_limit)


def conv_case(
    case: Case,
    dtype: torch.dtype,
    kernel: str,
    chips: Sequence[str] = CHIPS,
    in_place: bool = False,
    shared_limit: int | None = None,
) -> set[str]:
    """The names of the kernels that ran, in the PTX."""
    layout = layout_of(kernel)
    if layout is GpuLayout.CHWN:
        batch = 8 if case.batch in (1, 2) else case.batch // 8 * 8 + 8 * (case.batch > 0)
        case = replace(case, batch=batch)
    # Outside of the interpreter, under which every operation is slow.
    conv, _ = CudaConv(layer_of(case, layout, dtype), kernel), solved(case, dtype)
    ran = set()
    for ptx in interpreters(["sm_90a"] if "wgmma" in kernel else chips, shared_limit):
        with ptx:
            check_conv(conv, case, dtype, layout, in_place=in_place)
        assert len(ptx.launches) == (case.batch > 0)
        ran |= set(ptx.launches)
    return ran


def infinite_images(kernel: str) -> None:
    """The outputs of an image are finite if it is, whatever the images beside it hold."""
    case, layout = Case("infinite", GroupStructure.dense(3, 5), batch=8, hw=(5, 5)), layout_of(kernel)
    arguments = case.tensors(torch.float16)
    arguments.x[1:] = torch.inf
    out = arguments.x.new_empty(layout.shape((8, 5, 5, 5)))
    with Interpreter():
        CudaConv(layer_of(case, layout, torch.float16), kernel)(layout.from_nchw(arguments.x), out)
    assert torch.isfinite(layout.as_nchw(out)[0]).all()


def kernels_of(chip: str) -> set[str]:
    """The names of all kernels in the PTX for a chip."""
    files = build().glob(f"*.compute_{chip.removeprefix('sm_')}.ptx")
    return {name for file in files for name in re.findall(r"\.entry (\w+)\(", file.read_text())}


def prepared_block(case: BlockCase, dtype: torch.dtype) -> CudaBlock:
    step = case.step(dtype)
    tables = block_tables(step, dtype, CPU)
    rows, columns, tile_n = case.tile
    geometry = BlockGeometry.of(step, tables.slots, case.hw, (rows, columns), tile_n, case.turns)
    assert geometry is not None
    return CudaBlock(step, tables, geometry)


def block_case(
    case: BlockCase, dtype: torch.dtype, chips: Sequence[str] = CHIPS, in_place: bool = False
) -> set[str]:
    """The names of the kernels that ran, in the PTX."""
    block, _ = prepared_block(case, dtype), solved_block(case, dtype)
    ran = set()
    for ptx in interpreters(chips):
        with ptx:
            check_block(block, case, dtype, in_place=in_place)
        assert len(ptx.launches) == 1
        ran |= set(ptx.launches)
    return ran


def refused_block(case: BlockCase, name: str, value: int) -> str:
    """What the op says of a launch with one field changed: of the block, or of its first region."""

    def launch(*given: Any) -> None:
        *tensors, sizes = given
        if name in sizes._fields:
            return launch_op(*tensors, sizes._replace(**{name: value}))
        first, *others = sizes.regions
        launch_op(*tensors, sizes._replace(regions=(first._replace(**{name: value}), *others)))

    block = prepared_block(case, torch.float16)
    with Interpreter() as ptx, mock.patch.object(block_conv, "launch_op", launch):
        try:
            check_block(block, case, torch.float16)
        except DSPBackendError as error:
            assert not ptx.launches
            return str(error)
    return ""


class Prefers(Tuner):
    """A tuner that takes what it prefers where that is an option."""

    def __init__(self, *wanted: str) -> None:
        super().__init__(Choices(Path("nowhere")), None)
        self.wanted = wanted

    def fastest(self, key: Any, options: Mapping[str, Any], *, always: bool = False) -> str:
        return next((name for want in self.wanted for name in options if want in name), next(iter(options)))


@contextmanager
def cuda_on_host() -> Iterator[None]:
    """The GPU executor takes networks on the CPU, as on an H200."""
    with (
        mock.patch.object(cuda_conv, "why_no_cuda_on", return_value=""),
        mock.patch.object(block_conv, "why_no_cuda_on", return_value=""),
        mock.patch.object(cuda_conv, "has_wgmma", return_value=True),
        torch.no_grad(),
    ):
        yield


def runner_of(model: nn.Module, dtype: torch.dtype, size: Sequence[int], *wanted: str) -> GpuRunner:
    """Options whose names contain one of ``wanted`` are taken where there are such."""
    with evaluating(model):
        program = plan(trace(model, torch.zeros(8, *size)))
    program = program.map_tensors(lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    return GpuRunner(program, make_tuner=lambda device, what: Prefers(*wanted))


def released_network(
    shared: Path, name: str, count: int, dtype: torch.dtype, wanted: str
) -> tuple[Tensor, Tensor, Counter[str]]:
    """Logits of the network's PTX and of float32 for the first images, and how often each kernel ran."""
    model = read_released(shared / "nets" / f"{name}.npz").eval()
    images = cifar_images(shared)[:count]
    with cuda_on_host(), Interpreter("sm_90a") as ptx:
        run = runner_of(model, dtype, images.shape[1:], wanted)
        got = torch.cat([run([part.to(dtype)])[0].float() for part in images.split(8)])
    with torch.no_grad():
        return got, model(images), Counter(ptx.launches)
