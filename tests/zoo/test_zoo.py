"""Some networks of the zoo: packed and compared, learned, pruned. ``make test-zoo`` packs all of them."""

import networks
import pytest

from dsp_pruning import pack, unpack

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("name", networks.CI)
def test_packs_exactly(name: str, rate: float) -> None:
    result = networks.pack_masked(name, rate)
    assert result.error_64 <= 1e-10
    assert result.error_32 <= 1e-4
    assert result.removed > 0
    assert result.report.folded > 0
    assert result.macs_after < result.macs_before * (1 - rate / 2)


@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5"])
def test_unpacks_to_the_original_widths(name: str) -> None:
    model = networks.scramble(networks.build(name), 0.5, 1)
    x = networks.images(2, 64)
    packed = pack(model, x)
    dense = unpack(packed)
    assert networks.largest_error(dense, packed, [x]) <= 1e-10
    state = dense.state_dict()
    for key, value in model.state_dict().items():
        if not key.endswith("mask"):
            assert state[key].shape == value.shape, key


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
@pytest.mark.parametrize("mode", ["none", "exact"])
def test_learns_groups(name: str, mode: str) -> None:
    layers = networks.learn(name, mode).layers
    assert 0 < len(layers.chosen) < len(layers.convs)


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_is_pruned_to_the_rate_with_channel_flow_in_every_layer(name: str) -> None:
    report = networks.prune(name, 0.5)
    assert 50 <= report.pruned_flops < 50.5
    assert not any("own mask" in row["note"] for row in report.layers)


def test_there_are_as_many_networks_as_promised() -> None:
    names = networks.names()
    assert len(names) - len(networks.SEGMENTATION) >= 40
    assert len(set(networks.TIMM)) == 32
    assert {"alexnet", "convnext_base", "efficientnet_v2_s", *networks.CI} <= set(names)
