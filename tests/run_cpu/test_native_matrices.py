"""The released networks by products of matrices: AMX, or its emulation compiled from the same source."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import RELEASED, cifar_images, golden_logits
from isas import WORD_ISAS

import dsp_kernels
from dsp_kernels.run.cpu.program import native_networks
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning import read_released

AMX = [isa for isa in WORD_ISAS if isa.endswith("_amx")]


@pytest.fixture(params=AMX)
def amx(request: pytest.FixtureRequest, use_isa: Callable[[str], None]) -> None:
    use_isa(request.param)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("name", RELEASED)
def test_released_networks(shared: Path, name: str) -> None:
    """Integers to the bit those of plain PyTorch; bfloat16 near the published logits."""
    images, (golden, _) = cifar_images(shared)[:5], golden_logits(shared, name)
    packed = read_released(shared / "nets" / f"{name}.npz")
    quantized = dsp_kernels.quantize(packed, images)
    integers = dsp_kernels.fuse(quantized, backend="cpu")
    for batch in (1, 5):
        assert torch.equal(integers(images[:batch]), quantized(images[:batch]))
    halves = dsp_kernels.fuse(packed, images[:1], backend="cpu", dtype=torch.bfloat16)
    error = (halves(images) - golden[:5]).abs().max() / golden[:5].abs().max()
    assert error <= network_tolerance(torch.bfloat16, 576, int(name[6:8]))


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize(("batch", "kinds"), [(1, {"conv by matrices"}), (16, {"conv by matrices in place"})])
def test_rows_are_read_in_place_where_that_is_aligned(batch: int, kinds: set[str]) -> None:
    groups = [(range(12), range(12)), (range(8, 24), range(12, 24))]
    layer = dsp_kernels.PackedConv2d(dsp_kernels.GroupStructure.build(24, 24, groups), 3, padding=1)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).eval()
    quantized = dsp_kernels.quantize(model, torch.randn(8, 24, 8, 8))
    x = torch.randn(batch, 24, 8, 8)
    fused = dsp_kernels.fuse(quantized, backend="cpu")
    assert torch.equal(fused(x), quantized(x))
    ((network, _, _),) = native_networks(quantized.program, torch.float32)
    operations = [name for launch in network.launches([(8, 8)], batch, 1) for _, name in launch["operations"]]
    assert kinds == {name.split(" in tiles")[0] for name in operations if "matrices" in name}
