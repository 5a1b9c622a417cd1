"""Some networks of the zoo: packed and compared, learned, pruned. ``make test-zoo`` packs all of them."""

from typing import Any

import networks
import pytest
import torch
from torch import Tensor

from dsp_kernels.graph.compare import tensors_of
from dsp_pruning import GroupWrapper, pack, unpack

torchvision = pytest.importorskip("torchvision")
# Residual streams, concatenation, gates, shuffles, fire modules, branches.
CI = (
    *("resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "mnasnet0_5"),
    *("regnet_y_400mf", "densenet121"),
)


def loss_of(output: Any, _: Any = None) -> Tensor:
    return torch.stack([tensor.square().mean() for tensor in tensors_of(output)]).sum()


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("name", CI)
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
    model = networks.build(name).float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    settings: dict[str, Any] = {"example_input": torch.zeros(1, 3, 64, 64), "second_order": mode}
    learner = GroupWrapper(model, optimizer, loss_of, 2e-3, 3, 4, 0.5, **settings)
    layers = learner.layers
    before = [layer.conv.group.detach().clone() for layer in layers.chosen]
    for _ in range(3):
        x = torch.randn(4, 3, 64, 64)
        learner.initialize()
        optimizer.zero_grad(set_to_none=True)
        loss_of(learner(x)).backward()
        optimizer.step()
        learner.after_step(x, None)
    assert all(bool(tensor.isfinite().all()) for tensor in (*model.parameters(), *model.buffers()))
    assert 0 < len(layers.chosen) < len(layers.convs)
    for layer, start in zip(layers.chosen, before, strict=True):
        assert layer.out_channels == 1 or layer.conv.group.ne(start).any(), layer.name


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_is_pruned_to_the_rate_with_channel_flow_in_every_layer(name: str) -> None:
    model = networks.build(name).float()
    pruner = networks.pruned(model, torch.randn(1, 3, 64, 64), 4, 0.5)
    flops = pruner.report().pruned_flops
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(pruner(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
        pruner.after_step()
    assert all(bool(tensor.isfinite().all()) for tensor in (*model.parameters(), *model.buffers()))
    report = pruner.report()
    assert report.pruned_flops == flops
    assert 50 <= report.pruned_flops < 50.5
    assert not any("own mask" in row["note"] for row in report.layers)


def test_there_are_as_many_networks_as_promised() -> None:
    names = networks.names()
    assert len(names) - len(networks.SEGMENTATION) >= 40
    assert len(set(networks.TIMM)) == 32
    assert {"alexnet", "convnext_base", "efficientnet_v2_s", *CI} <= set(names)
