"""PruneWrapper: checkpoints, copies, settings, and models that are out of the ordinary."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruner_cases import fresh, learned, same, state_of, train, zeros
from torch import Tensor, nn
from toy_net import ToyA

from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning.prune.wrapper import PruneWrapper


def test_a_published_checkpoint_loads_and_decides_the_groups(tmp_path: Path) -> None:
    source = learned(fresh(3), n_groups=3)
    state = {k: v for k, v in source.model.state_dict().items() if not k.endswith(".mask")}
    torch.save([state, 91.5], tmp_path / "learned.pt")
    pruner = PruneWrapper(fresh(4), 3, 2)
    loaded, accuracy = torch.load(tmp_path / "learned.pt", weights_only=True)
    missing = pruner.model.load_state_dict(loaded, strict=False)
    assert accuracy == 91.5
    assert missing.unexpected_keys == []
    assert pruner.initialize(0.5) == source.initialize(0.5)
    assert same(state_of(pruner.model), state_of(source.model))
    # And a pruned one, whose masks count from the next step on.
    resumed = PruneWrapper(fresh(5), 3, 2)
    resumed.model.load_state_dict(pruner.model.state_dict())
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(0.01)
    resumed.after_step()
    assert all(torch.equal(zeros(resumed)[name], gone) for name, gone in zeros(pruner).items())


def test_masks_loaded_in_the_middle_replace_the_old_ones() -> None:
    pruner, other = learned(fresh()), learned(fresh(2), seed=5)
    pruner.initialize(0.3)
    pruner.after_step()
    other.initialize(0.6)
    pruner.model.load_state_dict(other.model.state_dict())
    train(pruner, 1)
    assert all(torch.equal(zeros(pruner)[name], gone) for name, gone in zeros(other).items())


def test_learned_groups_on_the_model_become_buffers() -> None:
    model = fresh()
    logits = torch.randn(3, 16)
    model.stage_1[0].conv_a.register_parameter("group", nn.Parameter(logits.clone(), requires_grad=False))
    PruneWrapper(model, 3, 2)
    assert torch.equal(model.stage_1[0].conv_a.group, logits)
    assert not any(name.endswith("group") for name, _ in model.named_parameters())


def by_pickle(pruner: PruneWrapper) -> PruneWrapper:
    return pickle.loads(pickle.dumps(pruner))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", range(4), ids=["new", "pruned", "stepped", "trained"])
def test_wrapper_and_model_can_be_copied_at_any_moment(
    duplicate: Callable[[PruneWrapper], PruneWrapper], moment: int
) -> None:
    pruner = learned(fresh())
    for act in (lambda: pruner.initialize(0.4), pruner.after_step, lambda: train(pruner))[:moment]:
        act()
    before = state_of(pruner.model)
    twin = duplicate(pruner)
    assert same(state_of(twin.model), before)
    assert twin.initialize(0.6) == pruner.initialize(0.6)
    train(twin)
    assert same(state_of(copy.deepcopy(pruner.model)), state_of(pruner.model))
    train(pruner)
    assert same(state_of(twin.model), state_of(pruner.model))
    assert b"fx.graph_module" not in pickle.dumps(pruner)  # no generated code in the file


def test_calling_the_wrapper_calls_the_model() -> None:
    pruner = learned(fresh())
    pruner.model.eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(pruner(x), pruner.model(x))


@pytest.mark.parametrize(
    ("settings", "filter_layers"),
    [
        ({"fp_every_nth_conv": 2}, ["stage_1.0.conv_b", "stage_2.0.conv_b", "stage_3.0.conv_b"]),
        ({"fp_every_nth_conv": 3}, ["stage_2.0.conv_a", "stage_3.0.conv_b"]),
        ({"fp_every_nth_conv": 2, "fp_layer_indices": [0, 4]}, ["stage_1.0.conv_a", "stage_3.0.conv_a"]),
        ({"fp_every_nth_conv": 2, "fp_layer_indices": []}, []),
        ({"fp_every_nth_conv": 2, "fp_layer_indices": -1}, []),
        ({"fp_every_nth_conv": -1}, []),
    ],
)
def test_which_layers_prune_filters(settings: dict[str, Any], filter_layers: list[str]) -> None:
    pruner = learned(fresh(), **({"fp_every_nth_conv": None} | settings))
    assert list(pruner.filter_layers) == filter_layers
    rows = pruner.summary()["layers"]
    assert [row["name"] for row in rows if row["prunes_filters"]] == filter_layers
    pruner.prune_at(0.3)
    for rule, before in zip(pruner._rules(), pruner.layers, strict=True):
        pruned_filters = not rule.mask(0.3).any(1).all()
        assert pruned_filters == (before.name in filter_layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither fp_every_nth_conv nor fp_layer_indices"),
        ({"fp_every_nth_conv": 0}, "fp_every_nth_conv is 0"),
        ({"fp_every_nth_conv": -2}, "fp_every_nth_conv is -2"),
        ({"fp_every_nth_conv": 1.5}, r"fp_every_nth_conv is 1\.5"),
        ({"fp_layer_indices": [6]}, "holds 6; expected 0 to 5"),
        ({"fp_layer_indices": [0, -1]}, "holds -1; expected 0 to 5"),
        ({"fp_layer_indices": ["a"]}, "fp_layer_indices is"),
        ({"fp_layer_indices": 3}, "fp_layer_indices is 3"),
        ({"fp_every_nth_conv": 2, "n_groups": 17}, r"'stage_1\.0\.conv_a' has 16 filters.*n_groups=17"),
        ({"fp_every_nth_conv": 2, "n_groups": 0}, "n_groups is 0"),
        ({"fp_every_nth_conv": 2, "n_groups": 2.0}, r"n_groups is 2\.0"),
        ({"fp_every_nth_conv": 2, "layers": lambda name, conv: False}, "no layer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    model = fresh()
    before = set(model.state_dict())
    with pytest.raises(DSPPruningError, match=message):
        PruneWrapper(model, **({"n_groups": 4} | settings))
    assert set(model.state_dict()) == before


NAMES = [f"stage_{stage}.0.conv_{conv}" for stage in (1, 2, 3) for conv in "ab"]


@pytest.mark.parametrize(
    "n_groups",
    [
        dict(zip(NAMES, (1, 2, 3, 4, 5, 64), strict=True)),
        lambda name, conv: (1, 2, 3, 4, 5, 64)[NAMES.index(name)],
    ],
    ids=["mapping", "callable"],
)
def test_every_layer_may_have_its_own_number_of_groups(n_groups: Any) -> None:
    pruner = learned(fresh(), n_groups)
    assert pruner.initialize(0.5)[0] >= 50
    rows = pruner.report().layers
    assert [row["groups"] for row in rows] == [1, 2, 3, 4, 5, 64]
    for row, layer in zip(rows, pruner.layers, strict=True):
        # Filters of one group read the same channels, so a layer has at most G different rows.
        kept = layer.conv.mask[:, :, 0, 0][layer.conv.mask.flatten(1).any(1)]
        assert len(row["group_channels"]) == row["groups_kept"] >= len(kept.unique(dim=0))
    train(pickle.loads(pickle.dumps(pruner)))
    assert pruner.n_groups == dict(zip(NAMES, (1, 2, 3, 4, 5, 64), strict=True))


@pytest.mark.parametrize(
    ("n_groups", "message"),
    [
        ({"stage_1.0.conv_a": 2}, r"missing \['stage_1\.0\.conv_b'"),
        (dict.fromkeys([*NAMES, "fc"], 2), r"unknown \['fc'\]"),
        (lambda name, conv: conv.out_channels + 1, "has 16 filters, too few for n_groups=17"),
        (lambda name, conv: "two", "n_groups is 'two' for layer 'stage_1.0.conv_a'"),
    ],
)
def test_numbers_of_groups_that_do_not_fit_are_refused_by_layer(n_groups: Any, message: str) -> None:
    model = fresh()
    before = set(model.state_dict())
    with pytest.raises(DSPPruningError, match=message):
        PruneWrapper(model, n_groups, 2)
    assert set(model.state_dict()) == before


def test_an_example_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(DSPShapeError):
        PruneWrapper(fresh(), 2, 2, example_input=torch.zeros(1, 5, 32, 32))


def test_groups_of_another_number_are_refused() -> None:
    model = learned(fresh(), n_groups=3).model
    with pytest.raises(DSPPruningError, match=r"'group' of shape \(3, 16\).*\(4, 16\)"):
        PruneWrapper(model, 4, 2)


def test_missing_group_logits_are_a_warning_that_names_the_layers() -> None:
    pruner = PruneWrapper(fresh(), 4, 2)
    with pytest.warns(UserWarning, match=r"stage_3\.0\.conv_b have no group logits"):
        pruner.initialize(0.5)
    assert all("no group logits" in row["note"] for row in pruner.summary()["layers"])


@pytest.mark.parametrize("name", ["weight", "group"])
def test_values_that_are_not_finite_are_refused_by_layer(name: str) -> None:
    pruner = learned(fresh())
    getattr(pruner.model.stage_2[0].conv_b, name).data[0, 0] = float("nan")
    with pytest.raises(DSPPruningError, match=r"'stage_2\.0\.conv_b'.*not finite"):
        pruner.initialize(0.5)


class Untraceable(ToyA):
    """Its forward asks for the value of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def test_a_model_that_cannot_be_traced_is_pruned_layer_by_layer() -> None:
    torch.manual_seed(0)
    pruner = learned(Untraceable(), fp_layer_indices=[1])
    flops, _ = pruner.initialize(0.5)
    assert flops >= 50
    summary = pruner.summary()
    assert "cannot be traced" in summary["note"]
    assert all("own mask alone" in row["note"] for row in summary["layers"])
    for rule in pruner._rules():
        mask = pruner.model.get_submodule(rule.name).mask[:, :, 0, 0] == 1
        assert torch.equal(mask, rule.mask(pruner.beta))
    train(pruner)
    assert pruner.summary()["pruned_flops"] == flops


def test_layers_of_any_dtype_and_with_one_group() -> None:
    pruner = learned(fresh().double(), n_groups=1)
    assert pruner.layers[0].conv.mask.dtype == torch.float64
    assert pruner.initialize(0.5)[0] >= 50
    half = learned(fresh().bfloat16(), n_groups=2)
    assert half.layers[0].conv.group.dtype == torch.float32
    assert half.initialize(0.5)[0] >= 50
