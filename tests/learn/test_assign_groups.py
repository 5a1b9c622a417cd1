"""assign_groups: groups from the weights alone."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, Setup
from nets import ToyA
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning import GroupWrapper, PruneWrapper, assign_groups, pack
from dsp_pruning.prune.rule import candidate_betas, channel_shares, hard_groups, keep, kernel_energy


def network(weight: Tensor) -> nn.Sequential:
    """A first conv, which takes no part, and one of this weight [O, C, k, k]."""
    filters, channels, kernel, _ = weight.shape
    model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, filters, kernel, bias=False))
    model[1].weight.data = weight
    return model


def found(weight: Tensor, n_groups: int, rate: float, **options: Any) -> Tensor:
    return assign_groups(network(weight), n_groups, rate, **options)["1"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight: Tensor, groups: Tensor, n_groups: int, rate: float) -> float:
    """Energy that stays at the smallest beta that prunes this share of the kernels."""
    energy = kernel_energy(weight)
    shares = channel_shares(energy, groups, n_groups)
    for beta in candidate_betas([shares]):
        mask = keep(shares, beta)[groups] & (energy > 0)
        if 1 - float(mask.double().mean()) >= rate - 1e-12:
            return float(energy[mask].sum())
    return float(energy[mask].sum())  # one channel per group


def same_partition(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left[:, None] == left, right[:, None] == right)


@pytest.mark.parametrize(
    ("filters", "channels", "n_groups", "share", "kernel"),
    [(16, 16, 2, 0.5, 3), (64, 48, 4, 0.25, 3), (60, 33, 3, 0.4, 1), (128, 256, 8, 0.125, 1)],
)
def test_planted_groups_are_found(
    filters: int, channels: int, n_groups: int, share: float, kernel: int
) -> None:
    """Each group, of any size, has large kernels in channels of its own and small ones elsewhere."""
    generator = torch.Generator().manual_seed(filters)
    more = torch.randint(n_groups, (filters - n_groups,), generator=generator)
    groups = torch.cat([torch.arange(n_groups), more])
    sets = torch.rand(n_groups, channels, generator=generator).argsort(1) < round(share * channels)
    weight = draw(filters, channels, kernel, kernel) * (sets[groups] + 0.2)[..., None, None]
    assert same_partition(found(weight, n_groups, 1 - share), groups)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_or_second_best_of_all_partitions_is_found(seed: int, rate: float) -> None:
    weight = draw(7, 6, 3, 3, seed=seed) * draw(7, 6, 1, 1, seed=seed + 9)
    every = (torch.tensor([0, *rest]) for rest in itertools.product((0, 1), repeat=6))
    energies = sorted(kept(weight, groups, 2, rate) for groups in every)
    assert kept(weight, found(weight, 2, rate), 2, rate) > energies[-2] - 1e-6


@pytest.mark.parametrize(("seed", "least"), [(0, 1.005), (1, 1.0), (2, 1.0)])
def test_many_small_contiguous_groups_are_found_or_bettered(seed: int, least: float) -> None:
    """The first search starts there. With seed 0 other groups keep more, if each channel has a price."""
    groups = torch.arange(32) // 2
    sets = torch.rand(16, 32, generator=torch.Generator().manual_seed(seed)).argsort(1) < 8
    weight = draw(32, 32, 1, 1, seed=seed) * (sets[groups] + 0.3)[..., None, None]
    assert kept(weight, found(weight, 16, 0.75), 16, 0.75) >= least * kept(weight, groups, 16, 0.75) - 1e-6


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (16, 5, 1, 3), (9, 40, 1, 1), (4, 1, 5, 5)])
@pytest.mark.parametrize("n_groups", [1, 4])
def test_never_less_than_contiguous_groups_keep(n_groups: int, shape: tuple[int, ...], rate: float) -> None:
    weight = draw(*shape)
    weight[2] = 0  # a filter without weights
    model = network(weight)
    groups = assign_groups(model, n_groups, rate)["1"]
    assert groups.shape == shape[:1]
    assert groups.dtype == torch.int64
    contiguous = torch.arange(shape[0]) * n_groups // shape[0]
    assert kept(weight, groups, n_groups, rate) >= kept(weight, contiguous, n_groups, rate) * (1 - 1e-12)
    assert torch.equal(hard_groups(model[1].group), groups)


def test_a_seed_decides_and_the_global_state_nothing() -> None:
    model = network(draw(32, 32, 3, 3))
    before = torch.get_rng_state()
    first, again = (assign_groups(model, 4, 0.5)["1"] for _ in range(2))
    seeds = [assign_groups(model, 4, 0.5, generator=torch.Generator().manual_seed(s))["1"] for s in (0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, seeds[0])
    assert not same_partition(first, seeds[1])


def test_the_groups_are_pruned_and_packed() -> None:
    torch.manual_seed(0)
    model = ToyA().eval()
    groups = assign_groups(model, {"conv1": 4, "conv2": 2, "conv3": 3}, 0.5)
    pruner = PruneWrapper(model, {"conv1": 4, "conv2": 2, "conv3": 3}, fp_layer_indices=[])
    assert 50 <= pruner.initialize(0.5)[0] < 55
    x = torch.randn(2, 3, 16, 16)
    packed = pack(model, x)
    torch.testing.assert_close(packed(x), model(x))
    for name, of_filters in groups.items():
        mask = model.get_submodule(name).mask[:, :, 0, 0]
        rows = {tuple(mask[of_filters == group].unique(dim=0).flatten().tolist()) for group in range(4)}
        assert len(packed.get_submodule(name).structure.groups) <= len(rows)


def test_learning_starts_from_the_groups_and_can_leave_them() -> None:
    setup = Setup()  # with random logits, which are replaced
    seed = torch.Generator().manual_seed
    wanted = assign_groups(copy.deepcopy(setup.model), 3, 0.6, generator=seed(1))
    arguments = (setup.model, setup.optimizer, F.cross_entropy, 0.05, 10, 3, 0.5)
    setup.learner = GroupWrapper(*arguments, init="weights", rate=0.6, generator=seed(1))
    before = setup.logits()
    for name, logits in zip(LAYERS, before, strict=True):
        assert torch.equal(hard_groups(logits), wanted[name])
    setup.step()
    assert not any(torch.equal(a, b) for a, b in zip(setup.logits(), before, strict=True))


def test_layers_that_take_no_part_get_no_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 3, 1),
        nn.Conv2d(3, 12, 5, stride=2, dilation=2, padding_mode="reflect", padding=2),
    )
    assert sorted(assign_groups(model, 4, 0.5)) == ["2", "5"]
    assert [name for name, _ in model.named_buffers()] == ["2.group", "5.group"]
    with pytest.raises(DSPPruningError, match="layer '3' has groups=2"):
        assign_groups(model, 4, 0.5, layers=lambda name, conv: name == "3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": -0.1}, r"rate is -0\.1; expected a fraction"),
        ({"rate": 1.0}, r"rate is 1\.0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": "half"}, "rate is 'half'"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"n_groups": 99}, "too few for n_groups=99"),
        ({"generator": 3}, r"generator is a int; it must be a torch\.Generator"),
        ({"value": float("inf")}, "layer 'conv3' has weights that are not finite"),
    ],
)
def test_invalid_settings_leave_the_model_unchanged(settings: dict[str, Any], message: str) -> None:
    model = ToyA()
    model.conv3.weight.data[1, 2] = settings.pop("value", 0)
    with pytest.raises(DSPPruningError, match=message):
        assign_groups(model, **{"n_groups": 3, "rate": 0.5} | settings)
    assert not any(hasattr(module, "group") for module in model.modules())
