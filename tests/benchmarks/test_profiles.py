"""Where one call of an engine spends its time."""

import pytest
import torch
from dsp_benchmarks.measure.floors import program_of
from dsp_benchmarks.measure.peaks import Peaks
from dsp_benchmarks.measure.profiles import profile_engine
from dsp_benchmarks.subjects.networks import Network
from torch import nn

from dsp_kernels.errors import DSPError

PEAKS = Peaks({"float32": 1e12, "bfloat16": 2e12}, 1e11)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_profile_names_parts_that_take_time(network: Network, name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    parts = profile_engine(name, network.form("packed"), network.images(2, 0), PEAKS)
    seconds = [part.seconds for part in parts]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) > 0
    if name == "torch":
        floors = {part.name: part.floor for part in parts}
        assert {"conv_1_3x3", "stage_1.0.conv_a", "classifier"} <= set(floors)
        assert floors["bn_1"] is None
        assert floors["conv_1_3x3"] == pytest.approx(2 * 2 * (16 * 3 * 9) * 256 / 1e12)
    if name == "openvino":  # its names come from the exported graph
        dense = profile_engine(name, network.form("dense"), network.images(2, 0), PEAKS)
        convs = [part for part in dense if part.name.startswith("/") and "/Conv" in part.name]
        assert len(convs) >= 7
        assert all(part.floor for part in convs)


def test_a_profile_of_a_fused_network_has_every_step_with_its_floor() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    x = torch.randn(2, 2, 8, 8)
    parts = profile_engine("fused:eager", model, x, PEAKS)
    steps = program_of(model, x).steps
    assert [part.name.partition(":")[0] for part in parts] == [step.output for step in steps]
    assert sum(part.seconds for part in parts) > 0
    assert all((part.floor or 0) > 0 for part in parts)


def test_an_engine_without_a_profile_says_which_have_one(network: Network) -> None:
    with pytest.raises(DSPError, match="'torchscript' has no profile; torch, "):
        profile_engine("torchscript", network.form("packed"), network.images(1, 0), PEAKS)
