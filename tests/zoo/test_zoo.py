"""Eight networks of the zoo, packed and compared; ``make test-zoo`` runs all of them."""

from __future__ import annotations

import pytest
import zoo

from dsp_pruning import pack
from dsp_pruning.packing.unpack import unpack

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("name", zoo.CI)
def test_packs_exactly(name: str, rate: float) -> None:
    result = zoo.run(name, rate)
    assert result.error_64 <= 1e-10
    assert result.error_32 <= 1e-4
    assert result.removed > 0
    assert result.folded > 0
    assert result.macs_after < result.macs_before * (1 - rate / 2)


@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5"])
def test_unpacks_to_the_original_widths(name: str) -> None:
    model = zoo.scramble(zoo.build(name), 0.5, 1)
    x = zoo.images(2, 64)
    packed = pack(model, x)
    dense = unpack(packed)
    assert zoo.largest_error(dense, packed, [x]) <= 1e-10
    state = dense.state_dict()
    for key, value in model.state_dict().items():
        if not key.endswith("mask"):
            assert state[key].shape == value.shape, key


def test_there_are_as_many_networks_as_promised() -> None:
    names = zoo.names()
    assert len(names) - len(zoo.SEGMENTATION) - len(zoo.TIMM) >= 40
    assert {"alexnet", "convnext_base", "efficientnet_v2_s", *zoo.CI} <= set(names)
