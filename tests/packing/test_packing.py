"""pack gives the masked network's outputs and holds nothing that the masks removed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import cifar_images
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import masked, settled
from test_packing_operations import images
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPPruningError, DSPShapeError, DSPVerificationError
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning import PruneWrapper, pack
from dsp_pruning.models import cifar_resnet


def scramble(model: nn.Module, rate: float, seed: int, *, clear_norms: bool, n_groups: int = 3) -> nn.Module:
    """Random group masks on every inner conv, random norms; a float64 model in eval mode.

    clear_norms: pruned filters lose their norm's weight and bias, as the pruner does it.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    gone: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, conv in convs[1:]:
            if "downsample" in name:
                continue
            rows, columns = conv.weight.shape[:2]
            group = torch.randint(0, n_groups, (rows,), generator=generator)
            channels = torch.rand(n_groups, columns, generator=generator) >= rate
            filters = torch.rand(rows, 1, generator=generator) >= rate / 2
            mask = channels[group] & filters
            conv.register_buffer("mask", mask[:, :, None, None].double())
            conv.weight.mul_(conv.mask)
            gone[name] = ~mask.any(1)
        for name, norm in settled(model, seed).named_modules():
            conv_name = name.replace("bn_", "conv_").replace("bn", "conv")
            if clear_norms and isinstance(norm, nn.BatchNorm2d) and conv_name in gone:
                for tensor in (norm.weight, norm.bias):
                    tensor[gone[conv_name]] = 0
    return model


@settings(max_examples=12, deadline=None)
@given(st.floats(0, 1), st.integers(0, 10**6), st.booleans(), st.integers(1, 5))
def test_equals_the_masked_network(rate: float, seed: int, clear_norms: bool, n_groups: int) -> None:
    model = scramble(cifar_resnet(8), rate, seed, clear_norms=clear_norms, n_groups=n_groups)
    expected = masked(model)
    packed = pack(model, images(2, 16))
    for size in (16, 9):
        x = images(3, size, seed)
        torch.testing.assert_close(packed(x), expected(x), rtol=0, atol=1e-10)
    assert sum(p.numel() for p in packed.parameters()) <= sum(p.numel() for p in model.parameters())


def test_trains_as_the_masked_network_does() -> None:
    model = scramble(cifar_resnet(8), 0.5, 3, clear_norms=True)
    dense, packed = masked(model), pack(model, images(2, 16))
    masks = {name: m.mask for name, m in dense.named_modules() if hasattr(m, "mask")}
    absent = {n: list(m.structure.absent) for n, m in packed.named_modules() if isinstance(m, PackedConv2d)}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (dense, packed)]
    for step in range(3):
        x, y = images(8, 16, step), torch.arange(8) % 10
        losses = []
        for network, optimizer in zip((dense, packed), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(network.train()(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-10)
        with torch.no_grad():  # what keeps a pruned filter pruned
            for name, mask in masks.items():
                dense.get_submodule(name).weight.mul_(mask)
                clear(dense, name, (~mask.flatten(1).any(1)).nonzero().flatten().tolist())
            for name, channels in absent.items():
                clear(packed, name, channels)
    mean = dense.stage_2[0].bn_b.running_mean
    torch.testing.assert_close(packed.stage_2[0].bn_b.running_mean, mean, rtol=0, atol=1e-10)


def clear(model: nn.Module, conv: str, channels: list[int]) -> None:
    norm = model.get_submodule(conv.replace("conv_", "bn_"))
    norm.weight[channels] = 0
    norm.bias[channels] = 0


def golden(shared: Path) -> tuple[np.lib.npyio.NpzFile, dict, nn.Module, Tensor]:
    file = np.load(shared / "golden" / "pack_resnet20.npz")
    model = cifar_resnet(20)
    state = {
        key[len("state/") :]: torch.from_numpy(file[key]) for key in file.files if key.startswith("state/")
    }
    model.load_state_dict(state)
    return file, json.loads(str(file["meta"])), model.double().eval(), cifar_images(shared)[:32].double()


def test_golden_logits_and_structure(shared: Path) -> None:
    file, meta, model, x = golden(shared)
    packed = pack(model, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(packed(x), torch.from_numpy(file["packed_logits64"]), rtol=0, atol=1e-12)
        torch.testing.assert_close(packed(x), torch.from_numpy(file["dense_logits64"]), rtol=0, atol=1e-12)
    plans = packed.packing.layers
    macs = params = 0
    sizes = {"stage_1": 32, "stage_2": 16, "stage_3": 8}
    for name, branches in meta["branches"].items():
        plan = plans[name]
        assert plan.structure is not None
        got = {
            (tuple(plan.out_keep[o] for o in g.out_index), tuple(plan.in_keep[i] for i in g.in_index))
            for g in plan.structure.groups
        }
        assert got == {(tuple(b["out"]), tuple(b["inp"])) for b in branches if b["out"]}, name
        params += plan.structure.params((3, 3))
        macs += plan.structure.macs((3, 3), (sizes[name[:7]],) * 2)
    assert params == meta["remaining_params_pruned_layers"]
    assert macs == meta["remaining_macs_pruned_layers"]


def test_constants_of_shifted_norms(shared: Path) -> None:
    """Pruned filters whose norm has a shift are constants, which a reader with zero padding does not fold."""
    file, _, model, x = golden(shared)
    with torch.no_grad():
        for key in file.files:
            if key.startswith("shifted_bn_bias/"):
                model.get_parameter(f"{key.split('/')[1]}.bias").copy_(torch.from_numpy(file[key]))
    expected = torch.from_numpy(file["dense_logits64_with_shifted_bn_bias"])
    assert (expected - torch.from_numpy(file["dense_logits64"])).abs().max() > 1  # the shifts matter
    packed = pack(model, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dsp_kernels.fuse(packed, x[:2])(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision(name: str) -> None:
    """Also by tools that are built on torch.fx."""
    models = pytest.importorskip("torchvision").models
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = scramble(getattr(models, name)(num_classes=7), 0.6, 4, clear_norms=True)
    packed = pack(model, images(1, 64))
    x = images(2, 64, 5)
    expected = masked(model)(x)
    for network in (packed, dsp_kernels.swap(copy.deepcopy(packed))):
        features = extraction.create_feature_extractor(network, ["fc"])(x)["fc"]
        for got in (network(x), torch.fx.symbolic_trace(network)(x), features):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert all(not hasattr(m, "mask") for m in packed.modules())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, packed))
    assert after < 0.6 * before


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 4)),
    ).double()


def _dead(model: nn.Sequential) -> None:
    for filters, conv, norm in (([1, 4], 0, 1), ([0], 3, 4)):
        for tensor in (model[conv].weight, model[conv].bias, model[norm].weight, model[norm].bias):
            tensor[filters] = 0


def _unread(model: nn.Sequential) -> None:
    model[3].weight[:, 2] = 0  # no filter reads channel 2 of the first convolution
    model[8].weight[:, 16:32] = 0  # and the linear layer does not read channel 1 of the second


def _constant(model: nn.Sequential) -> None:
    model[0].weight[[1, 4]] = 0
    model[1].bias[[1, 4]] = torch.tensor([0.7, -9.0], dtype=torch.float64)  # ReLU makes one of them 0


@pytest.mark.parametrize(
    ("change", "widths"),
    [(_dead, (4, 4, 4 * 16)), (_unread, (5, 4, 4 * 16)), (_constant, (5, 5, 5 * 16))],
    ids=["dead filters", "unread channels", "a constant before zero padding"],
)
def test_channels_are_removed_from_every_layer(
    change: Callable[[nn.Sequential], None], widths: tuple[int, int, int]
) -> None:
    model = chain().eval()
    with torch.no_grad():
        change(model)
    packed = pack(model, images(2, 8))
    assert isinstance(packed[0], PackedConv2d)
    assert (packed[0].out_channels, packed[3].out_channels, packed[8].in_features) == widths
    assert (packed[1].num_features, packed[3].in_channels, packed[4].num_features) == (
        *2 * widths[:1],
        widths[1],
    )
    torch.testing.assert_close(packed(images(3, 8)), model(images(3, 8)), rtol=0, atol=1e-12)


def test_a_residual_stream_loses_a_channel_only_if_no_tensor_needs_it() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = (nn.Conv2d(c, 6, 3, padding=1, bias=False) for c in (3, 6, 6))
            self.classifier = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            x = F.relu(x + self.inner(x))
            return self.classifier(F.relu(self.last(x) + x).mean((2, 3)))

    torch.manual_seed(0)
    model = Stream().double().eval()
    with torch.no_grad():
        model.first.weight[[0, 1]] = 0
        model.inner.weight[[1, 2]] = 0
        model.last.weight[[1, 5]] = 0
    packed = pack(model, images(2, 8))
    assert packed.first.out_channels == 5  # only channel 1 is zero everywhere
    assert packed.classifier.in_features == 5
    torch.testing.assert_close(packed(images(3, 8)), model(images(3, 8)), rtol=0, atol=1e-12)


def test_a_network_pruned_away_whole_still_runs() -> None:
    model = scramble(cifar_resnet(8), 0.5, 0, clear_norms=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
            if isinstance(module, nn.BatchNorm2d):
                module.weight.zero_()
                module.bias.zero_()
    packed = pack(model, images(2, 16))
    torch.testing.assert_close(packed(images(3, 16)), model(images(3, 16)), rtol=0, atol=1e-12)
    torch.testing.assert_close(dsp_kernels.fuse(packed, images(2, 16))(images(3, 16)), model(images(3, 16)))


def test_packing_a_packed_network_changes_nothing() -> None:
    packed = pack(scramble(cifar_resnet(8), 0.5, 1, clear_norms=True), images(2, 16))
    again = pack(packed, images(2, 16))
    assert [m.structure for m in again.modules() if isinstance(m, PackedConv2d)] == [
        m.structure for m in packed.modules() if isinstance(m, PackedConv2d)
    ]
    assert torch.equal(again(images(3, 16)), packed(images(3, 16)))


def test_the_model_is_unchanged_and_shares_no_memory() -> None:
    model = scramble(cifar_resnet(8), 0.5, 1, clear_norms=True).train()
    state = copy.deepcopy(model.state_dict())
    packed = pack(model, images(2, 16))
    assert packed.training
    assert model.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    memory = {p.data_ptr() for p in model.parameters()}
    assert not memory & {p.data_ptr() for p in packed.parameters()}


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda module, args, y: 1.1 * y, "differs from the masked one on the example input"),
        (lambda module, args, y: y + torch.ones(16, 1, 1), "does not run on the example input"),
    ],
)
def test_a_wrong_packed_network_is_never_returned(hook: Callable[..., Tensor], words: str) -> None:
    """Tracing does not see hooks: that of a convolution is lost, that of a norm expects the old width."""
    model = scramble(cifar_resnet(8), 0.5, 1, clear_norms=True)
    block = model.stage_1[0]
    (block.conv_a if "differs" in words else block.bn_a).register_forward_hook(hook)
    with pytest.raises(DSPVerificationError, match=words):
        pack(model, images(2, 16))


def test_amplified_rounding_errors_are_accepted() -> None:
    class Amplified(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e4 * self.model(x))

    model = Amplified(scramble(cifar_resnet(8), 0.5, 1, clear_norms=True).float())
    x = images(2, 16).float()
    packed = pack(model, x)
    assert (packed(x) - masked(model)(x)).abs().max() > 2 * network_tolerance(torch.float32, 576, 10)
    model.model.stage_1[0].conv_a.register_forward_hook(lambda module, args, y: 1.001 * y)
    with pytest.raises(DSPVerificationError, match="differs from the masked one"):
        pack(model, x)


def test_warns_of_weights_that_are_not_0_where_the_mask_is() -> None:
    model = scramble(cifar_resnet(8), 0.5, 1, clear_norms=True)
    with torch.no_grad():
        model.stage_1[0].conv_a.weight += 0.01
    with pytest.warns(UserWarning, match=r"'stage_1.0.conv_a' has \d+ weights .*after_step"):
        packed = pack(model, images(2, 16))
    torch.testing.assert_close(packed(images(3, 16)), masked(model)(images(3, 16)), rtol=0, atol=1e-10)
    del model.stage_1[0].conv_a.mask
    model.stage_1[0].conv_b.mask = torch.ones(16, 16, 3, 3)
    with pytest.raises(DSPPruningError, match=r"expected \(16, 16, 1, 1\)"):
        pack(model, images(2, 16))


def test_packs_under_autocast_and_from_a_wrapper() -> None:
    pruner = PruneWrapper(cifar_resnet(8).double(), 2, -1, example_input=images(2, 16))
    pruner.initialize(0.3)
    with torch.autocast("cpu", torch.bfloat16):
        packed = pack(pruner, images(2, 16))
    torch.testing.assert_close(
        packed.eval()(images(3, 16)), pruner.model.eval()(images(3, 16)), rtol=0, atol=1e-10
    )
    with pytest.raises(DSPShapeError, match="expected a tensor"):
        pack(packed, ["images"])  # type: ignore[list-item]
