"""pack(..., fixed_size=True): constants in front of zero padding, for images of one size."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import test_packing_any as cases
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import fuse
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.graph.size_check import FixedSizeConv2d
from dsp_pruning import pack, unpack
from dsp_pruning.export import export_pt2


def padded() -> tuple[nn.Module, nn.Module, Tensor]:
    """A net with two zero channels and two constants in front of a zero-padded 3x3; masked; images."""
    model = cases.net("nothing", 3, 0)
    return model, cases.masked(model), cases.images(3, 12)


@pytest.mark.parametrize("name", cases.OPERATIONS)
def test_outputs_at_the_size_of_the_example(name: str) -> None:
    model, x = cases.net(name, 3, 1), cases.images(2, 12)
    packed, expected = pack(model, x, fixed_size=True), cases.masked(model)(x)
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(unpack(packed)(x), expected, rtol=0, atol=1e-12)


def test_folds_only_on_request() -> None:
    model, _, x = padded()
    plain, fixed = pack(model, x), pack(model, x, fixed_size=True)
    assert not any(isinstance(module, FixedSizeConv2d) for module in plain.modules())
    assert plain.stem.out_channels == cases.WIDTH - 2
    assert fixed.stem.out_channels == cases.WIDTH - 4
    assert isinstance(fixed.reader, FixedSizeConv2d)
    assert fixed.packing.layers["reader"].folded == (5, 9)
    border, middle = fixed.reader.position_bias[:, 0, 0], fixed.reader.position_bias[:, 5, 5]
    assert (border - middle).abs().max() > 0.01  # one bias per channel would be wrong


def test_all_forms_refuse_other_sizes(tmp_path: Path) -> None:
    model, masked, x = padded()
    packed = pack(model, x, fixed_size=True)
    dsp_kernels.save(packed, tmp_path / "net", x)
    loaded = dsp_kernels.load(tmp_path / "net")
    forms = (packed, loaded, fuse(packed, x), fuse(loaded, x), copy.deepcopy(packed), unpack(packed))
    assert torch.equal(loaded(x), packed(x))
    assert loaded.example_shape == (1, 3, 12, 12)
    for form in forms:
        torch.testing.assert_close(form(x), masked(x), rtol=0, atol=1e-12)
        for height, width in ((11, 12), (12, 13), (24, 24)):
            with pytest.raises(DSPShapeError, match="right only for"):
                form(torch.zeros(1, 3, height, width, dtype=x.dtype))
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


@pytest.mark.parametrize(("stride", "dilation", "kernel"), [(2, 1, 3), (1, 2, 3), (2, 1, 5), (3, 2, 3)])
def test_strides_and_dilations(stride: int, dilation: int, kernel: int) -> None:
    """With stride 2, images of 11 and of 12 give outputs of one size, but other borders."""
    model, _, x = padded()
    conv = nn.Conv2d(cases.WIDTH, 6, kernel, stride, kernel // 2, dilation).double()
    conv.register_buffer("mask", (torch.rand(6, cases.WIDTH) < 0.7)[:, :, None, None].double())
    model.reader = conv
    packed = pack(model, x, fixed_size=True)
    assert packed.stem.out_channels == cases.WIDTH - 4
    torch.testing.assert_close(packed(x), cases.masked(model)(x), rtol=0, atol=1e-12)
    with pytest.raises(DSPShapeError, match="height == 12"):
        packed(cases.images(3, 11))


def test_trains_exports_and_packs_again(tmp_path: Path) -> None:
    model, masked, x = padded()
    packed = pack(model, x, fixed_size=True)
    export_pt2(packed, tmp_path / "net.pt2", x)
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), masked(x))
    torch.testing.assert_close(pack(packed, x)(x), masked(x), rtol=0, atol=1e-12)  # a packed network again
    packed.train()(x).square().sum().backward()
    assert packed.reader.position_bias.grad is not None
    assert "reader.position_bias" in packed.state_dict()
