"""PruneWrapper: settings, checkpoints, copies, reports, and models that are out of the ordinary."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import ToyA
from pruner_cases import fresh, learned, same, state_of, train, zeros
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.prune.rule import layer_rule
from dsp_pruning.prune.wrapper import PruneWrapper


def test_a_published_checkpoint_defines_the_groups(tmp_path: Path) -> None:
    source = learned(fresh(3), n_groups=3)
    state = {k: v for k, v in source.model.state_dict().items() if not k.endswith(".mask")}
    torch.save([state, 91.5], tmp_path / "learned.pt")
    pruner = PruneWrapper(fresh(4), 3, 2)
    loaded, _ = torch.load(tmp_path / "learned.pt", weights_only=True)
    assert pruner.model.load_state_dict(loaded, strict=False).unexpected_keys == []
    assert pruner.initialize(0.5) == source.initialize(0.5)
    assert same(state_of(pruner.model), state_of(source.model))
    # The masks of a pruned checkpoint are used from the next step on.
    resumed = PruneWrapper(fresh(5), 3, 2)
    resumed.model.load_state_dict(pruner.model.state_dict())
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(0.01)
    resumed.after_step()
    assert all(torch.equal(zeros(resumed)[name], gone) for name, gone in zeros(pruner).items())


def test_masks_loaded_later_replace_the_old_ones() -> None:
    pruner, other = learned(fresh()), learned(fresh(2), seed=5)
    pruner.initialize(0.3)
    pruner.after_step()
    other.initialize(0.6)
    pruner.model.load_state_dict(other.model.state_dict())
    train(pruner, 1)
    assert all(torch.equal(zeros(pruner)[name], gone) for name, gone in zeros(other).items())


def test_learned_logits_on_the_model_become_buffers() -> None:
    model = fresh()
    logits = torch.randn(3, 16)
    model.stage_1[0].conv_a.register_parameter("group", nn.Parameter(logits.clone(), requires_grad=False))
    PruneWrapper(model, 3, 2)
    assert torch.equal(model.stage_1[0].conv_a.group, logits)
    assert not any(name.endswith("group") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))],
    ids=["deepcopy", "pickle"],
)
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


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_pruned_like_the_network_inside(around: Callable[[nn.Module], nn.Module]) -> None:
    plain = learned(fresh())
    network = fresh()
    pruner = learned(network)
    wrapped = PruneWrapper(around(network), 3, 2)
    assert wrapped.filter_layers == pruner.filter_layers
    assert wrapped.initialize(0.5) == plain.initialize(0.5)
    assert same(state_of(network), state_of(plain.model))


NAMES = [f"stage_{stage}.0.conv_{conv}" for stage in (1, 2, 3) for conv in "ab"]


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"fp_every_nth_conv": 2}, [1, 3, 5]),
        ({"fp_every_nth_conv": 3}, [2, 5]),
        ({"fp_every_nth_conv": 2, "fp_layer_indices": [0, 4]}, [0, 4]),
        ({"fp_every_nth_conv": 2, "fp_layer_indices": []}, []),
        ({"fp_every_nth_conv": 2, "fp_layer_indices": -1}, []),
        ({"fp_every_nth_conv": -1}, []),
    ],
)
def test_which_layers_prune_filters(settings: dict[str, Any], chosen: list[int]) -> None:
    pruner = learned(fresh(), 1, **({"fp_every_nth_conv": None, "prune_channels": False} | settings))
    wanted = [NAMES[index] for index in chosen]
    assert list(pruner.filter_layers) == wanted
    assert [row["name"] for row in pruner.summary()["layers"] if row["prunes_filters"]] == wanted
    pruner.prune_at(0.3)
    assert [name for name, gone in zeros(pruner).items() if gone.all(1).any()] == wanted


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
        ({"n_groups": 65}, r"'stage_1\.0\.conv_a' \(16 filters, too few for n_groups=65"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"n_groups": dict.fromkeys([*NAMES, "fc"], 2)}, r"unknown \['fc'\]"),
        ({"layers": lambda name, conv: False}, "no layer"),
        ({"target": "flops"}, "target is 'flops'"),
        ({"channel_multiple": 0}, "channel_multiple is 0"),
        ({"channel_multiple": 2.0}, r"channel_multiple is 2\.0"),
        ({"channel_multiple": 8, "prune_channels": False}, "prune_channels is False"),
    ],
)
def test_invalid_settings_leave_the_model_unchanged(settings: dict[str, Any], message: str) -> None:
    model = fresh()
    before = set(model.state_dict())
    if settings and not any(name.startswith("fp_") for name in settings):
        settings = settings | {"fp_every_nth_conv": 2}
    with pytest.raises(DSPPruningError, match=message):
        PruneWrapper(model, **({"n_groups": 4} | settings))
    assert set(model.state_dict()) == before


COUNTS = (1, 2, 3, 4, 5, 64)


@pytest.mark.parametrize(
    "n_groups",
    [dict(zip(NAMES, COUNTS, strict=True)), lambda name, conv: COUNTS[NAMES.index(name)]],
    ids=["mapping", "callable"],
)
def test_every_layer_may_have_its_own_number_of_groups(n_groups: Any) -> None:
    pruner = learned(fresh(), n_groups)
    assert pruner.initialize(0.5)[0] >= 50
    rows = pruner.report().layers
    assert [row["groups"] for row in rows] == list(COUNTS)
    for row, layer in zip(rows, pruner.layers, strict=True):
        # Filters of one group read the same channels, so a layer has at most G different rows.
        kept = layer.conv.mask[:, :, 0, 0][layer.conv.mask.flatten(1).any(1)]
        assert len(row["group_channels"]) == row["groups_kept"] >= len(kept.unique(dim=0))
    train(pickle.loads(pickle.dumps(pruner)))
    assert pruner.n_groups == dict(zip(NAMES, COUNTS, strict=True))


def test_existing_logits_for_another_number_of_groups() -> None:
    model = learned(fresh(), n_groups=3).model
    with pytest.raises(DSPPruningError, match=r"'group' of shape \(3, 16\).*\(4, 16\)"):
        PruneWrapper(model, 4, 2)


def test_missing_group_logits_are_a_warning_that_names_the_layers() -> None:
    pruner = PruneWrapper(fresh(), 4, 2)
    with pytest.warns(UserWarning, match=r"stage_3\.0\.conv_b have no group logits"):
        pruner.initialize(0.5)
    assert all("no group logits" in row["note"] for row in pruner.summary()["layers"])


@pytest.mark.parametrize("name", ["weight", "group"])
def test_a_layer_with_values_that_are_not_finite(name: str) -> None:
    pruner = learned(fresh())
    getattr(pruner.model.stage_2[0].conv_b, name).data[0, 0] = float("nan")
    with pytest.raises(DSPPruningError, match=r"'stage_2\.0\.conv_b'.*not finite"):
        pruner.initialize(0.5)


class Untraceable(ToyA):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def test_a_model_that_cannot_be_traced_is_pruned_layer_by_layer() -> None:
    torch.manual_seed(0)
    pruner = learned(Untraceable(), fp_layer_indices=[1])
    before = [layer.conv.weight.detach().clone() for layer in pruner.layers]
    flops, _ = pruner.initialize(0.5)
    assert flops >= 50
    assert pruner.beta is not None
    summary = pruner.summary()
    assert "cannot be traced" in summary["note"]
    assert all("own mask alone" in row["note"] for row in summary["layers"])
    for layer, weight in zip(pruner.layers, before, strict=True):
        rule = layer_rule(layer, weight, torch.ones(1), layer.name in pruner.filter_layers, True)
        assert torch.equal(layer.conv.mask[:, :, 0, 0] == 1, rule.mask(pruner.beta))
    train(pruner)
    assert pruner.summary()["pruned_flops"] == flops


@pytest.mark.parametrize(
    ("dtype", "logits"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_layers_of_any_dtype(dtype: torch.dtype, logits: torch.dtype) -> None:
    pruner = learned(fresh().to(dtype), n_groups=2)
    assert pruner.layers[0].conv.mask.dtype == dtype
    assert pruner.layers[0].conv.group.dtype == logits
    assert pruner.initialize(0.5)[0] >= 50


def test_a_preview_changes_nothing_and_is_right() -> None:
    pruner = learned(fresh(), channel_multiple=4)
    before = state_of(pruner.model)
    low, high = pruner.reachable()
    expected = pruner.preview(0.6)
    assert same(state_of(pruner.model), before)
    with pytest.raises(DSPPruningError, match="call initialize"):
        pruner.after_step()  # nothing is pruned yet
    assert low == 0
    assert pruner.initialize(0.6) == (expected.pruned_flops, expected.pruned_params)
    assert pruner.report() == expected
    assert pruner.initialize(high)[0] == pytest.approx(100 * high)
    train(pruner)
    assert pruner.reachable()[0] == pytest.approx(high)  # what is pruned stays pruned
    with pytest.raises(DSPPruningError, match="out of reach"):
        learned(fresh()).preview(0.99999)


def test_the_report_shows_what_every_layer_keeps() -> None:
    pruner = learned(fresh())
    flops, _ = pruner.initialize(0.5)
    lines = str(pruner.report()).splitlines()
    assert lines[0].startswith(f"{flops:.2f} % of the FLOPs")
    for layer in pruner.layers:
        mask = layer.conv.mask[:, :, 0, 0] != 0
        line = next(line for line in lines if line.startswith(layer.name))
        assert f" {int(mask.sum())}/{mask.numel()} " in line
        assert f" {int(mask.any(1).sum())}/{mask.shape[0]} " in line
        assert ("(f)" in line) == (layer.name in pruner.filter_layers)
