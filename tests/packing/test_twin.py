"""dense_twin: the dense network of a packed one, from its file alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_packing_any as cases
import torch
from torch import nn

import dsp_kernels
from dsp_kernels.errors import DSPFormatError
from dsp_pruning import pack
from dsp_pruning.packing.twin import dense_twin


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of the weights that convolutions, linear layers and norms have in any case."""
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name.endswith("weight")}


@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("name", cases.OPERATIONS)
def test_a_loaded_network_has_a_twin_of_the_widths_before_packing(
    tmp_path: Path, name: str, fixed_size: bool
) -> None:
    model, x = cases.net(name, 3, 1), cases.images(2, 12)
    packed = pack(model, x, fixed_size=fixed_size)
    try:
        dsp_kernels.save(packed, tmp_path / "net", x)
    except DSPFormatError:
        pytest.skip("a file cannot hold this operation")
    twin = dense_twin(pack(dsp_kernels.load(tmp_path / "net"), x))  # packed twice: the first widths count
    assert not any(isinstance(module, dsp_kernels.PackedConv2d) for module in twin.modules())
    original = shapes(model)
    for path, shape in shapes(twin).items():
        assert shape == original[path.replace(".conv.", ".")], path  # of a FixedSizeConv2d
    assert twin(x).isfinite().all()


def test_a_network_that_pack_did_not_make_has_a_twin_of_its_present_widths() -> None:
    structure = dsp_kernels.GroupStructure.build(3, 6, [([0, 2], [0, 1, 4]), ([1], [2, 3])])
    packed = nn.Sequential(dsp_kernels.PackedConv2d(structure, 3, padding=1, bias=True), nn.ReLU())
    twin = dense_twin(packed)
    assert shapes(twin) == {"0.weight": (6, 3, 3, 3)}
    assert twin(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 8, 8)


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ({"elsewhere": (3, 6, 1)}, "not in the network: 'elsewhere'"),
        ({"0": (3, 7, 2)}, "layer '0'"),
        ({"0": (2**20, 2**20, 1)}, "more than 1073741824 parameters"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths: dict[str, tuple[int, int, int]], words: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 1))
    network.dense_widths = widths
    with pytest.raises(DSPFormatError, match=words):
        dense_twin(network)
