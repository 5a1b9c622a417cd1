"""LayerTimes: predictions agree with each other, files are checked, and fitting finds planted times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dsp_kernels import GroupStructure, fuse
from dsp_kernels.errors import DSPBackendError, DSPFormatError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.cpu.conv import add_conv
from dsp_kernels.run.cpu.extension import native, new_network
from dsp_kernels.times import calibrate
from dsp_kernels.times.clocked import clocked_steps
from dsp_kernels.times.model import LayerTimes, features, machine_name, macs, surroundings

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native kernels")

SPEC = ConvSpec(
    GroupStructure.build(16, 24, [(range(12), range(10)), (range(5, 16), range(12, 24))]), 3, 1, 1
)


def made_up() -> LayerTimes:
    keys = ("1 threads", "2 threads together", "2 threads apart")
    weights = np.linspace(1e-3, 2e-3, len(features()))
    return LayerTimes(machine_name(), {f"float32, {key}": weights for key in keys})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 32])
def test_twice_as_much_of_anything_takes_longer(threads: int, batch: int) -> None:
    def time(spec: ConvSpec, size: int = 16, images: int = batch) -> float:
        return made_up().layer(spec, (size, size), images, threads)

    wider = GroupStructure.build(32, 24, [(range(24), range(10)), (range(10, 32), range(12, 24))])
    longer = GroupStructure.build(16, 48, [(range(12), range(20)), (range(5, 16), range(24, 48))])
    small = time(SPEC)
    assert 0 < small < min(time(replace(SPEC, structure=wider)), time(replace(SPEC, structure=longer)))
    assert small < min(time(SPEC, 32), time(SPEC, images=4 * batch), time(replace(SPEC, kernel_size=(5, 5))))


def test_a_layer_takes_the_same_whichever_channels_it_reads() -> None:
    def of(structure: GroupStructure) -> float:
        return made_up().layer(ConvSpec(structure, 3, 1, 1), (12, 12), threads=1)

    same = (
        of(GroupStructure.build(8, 6, [(range(4), range(3))])),
        of(GroupStructure.build(8, 6, [([1, 3, 6, 7], [0, 2, 5])])),
    )
    assert same[0] == pytest.approx(same[1])


def test_a_network_takes_as_long_as_its_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    program = fuse(net, torch.zeros(1, 3, 16, 16), backend="cpu").program
    times = made_up()
    _, steps = clocked_steps(program, 1, 1, times)
    around = surroundings(program, 1, threads=1)
    step = program.steps[1]
    assert times.layer(step.spec, (16, 16), 1, 1, around=around) == pytest.approx(steps[step.output])
    assert macs(step.spec, (16, 16)) == 8 * 8 * 9 * 256


def test_threads_that_were_not_measured_are_named() -> None:
    with pytest.raises(DSPBackendError, match=r"not for float32, 3 threads.*--threads 3"):
        made_up().layer(SPEC, (8, 8), threads=3)


def test_a_network_without_weights_is_planned_but_does_not_run() -> None:
    network = new_network()
    network.output(add_conv(network, SPEC, None, None, network.input(16)))
    assert network.launches([(8, 8)], 1, 1)
    with pytest.raises(ValueError, match="no weights"):
        network.run([torch.zeros(1, 16, 8, 8).numpy()], [torch.zeros(1, 24, 8, 8).numpy()], 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_operations_of_a_network_are_timed_and_computed(threads: int) -> None:
    conv = nn.Conv2d(3, 8, 3)
    network, x = new_network(), torch.randn(4, 3, 9, 9)
    spec = ConvSpec(GroupStructure.dense(3, 8), 3)
    network.output(add_conv(network, spec, [conv.weight], conv.bias, network.input(3)))
    y = torch.empty(4, 8, 7, 7)
    times = network.times([x.numpy()], [y.numpy()], threads, 0, 3)
    launches = network.launches([(9, 9)], 4, threads)
    assert [len(one) for one in times] == [len(launch["operations"]) for launch in launches]
    assert all(time > 0 for one in times for time in one)
    torch.testing.assert_close(y, conv(x).detach(), atol=1e-5, rtol=1e-5)


def test_explain_shows_measured_beside_predicted_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DSP_KERNELS_CACHE", raising=False)
    fused = fuse(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.zeros(1, 3, 16, 16), backend="cpu"
    )
    assert " us]" in fused.explain(verbose=True)
    threads = torch.get_num_threads()
    key = f"float32, {threads} threads" + " together" * (threads > 1)
    (tmp_path / "dsp-kernels").mkdir()
    LayerTimes(machine_name(), {key: np.ones(len(features()))}).save()
    assert " us, predicted " in fused.explain(verbose=True)


def test_a_file_holds_what_was_measured(tmp_path: Path) -> None:
    times = made_up()
    again = LayerTimes.load(times.save(tmp_path / "times.json"))
    assert again.machine == times.machine
    assert again.weights.keys() == times.weights.keys()
    assert all((again.weights[key] == row).all() for key, row in times.weights.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "another"}, "another version"),
        ({"features": ["operations"]}, "another version"),
        ({"machine": "a supercomputer"}, "a supercomputer, this machine is"),
        ({"weights": {"float32, 1 threads": [1.0]}}, "impossible times"),
        ({"weights": {"float32, 1 threads": ["x"]}}, "no layer times"),
        ({"weights": [1]}, "no layer times"),
        (None, "no layer times"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any] | None, says: str) -> None:
    file = made_up().save(tmp_path / "times.json")
    text = file.read_text()
    file.write_text(text[: len(text) // 2] if change is None else json.dumps(json.loads(text) | change))
    with pytest.raises(DSPFormatError, match=rf"{says}.*dsp calibrate"):
        LayerTimes.load(file)


@pytest.mark.parametrize("number", [-1.0, 0.0, float("nan")])
def test_impossible_times_are_refused(tmp_path: Path, number: float) -> None:
    times = LayerTimes(machine_name(), {"float32, 1 threads": np.full(len(features()), number)})
    with pytest.raises(DSPFormatError, match="impossible times"):
        LayerTimes.load(times.save(tmp_path / "times.json"))


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dsp calibrate"):
        LayerTimes.load(tmp_path / "none.json")


def test_the_least_squares_are_not_negative() -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((50, 6))
    values = rows @ np.array([1.0, 0.0, 2.0, -1.0, 0.5, 0.0]) + 0.01 * rng.standard_normal(50)
    x = calibrate.nonnegative(rows, values)
    slope = rows.T @ (rows @ x - values)
    assert (x >= 0).all()
    assert x[3] == 0
    assert np.abs(slope[x > 0]).max() < 1e-6  # Karush, Kuhn and Tucker
    assert slope.min() > -1e-6


def test_calibration_finds_planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is replaced by a planted model, so what is fitted predicts it on another network."""
    planted = made_up()

    def measure(network: Any, shapes: Any, images: int, threads: int) -> Any:
        launches = network.launches([shape[1:] for shape in shapes], images, threads)
        blocks = [-(-launch["images"] // launch["interleave"]) for launch in launches]
        return launches, [
            list(calibrate.counted(launch, threads) @ planted.weights["float32, 1 threads"] * block)
            for launch, block in zip(launches, blocks, strict=True)
        ]

    ticks = iter(range(10**6))
    monkeypatch.setattr(calibrate, "measure", measure)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: float(next(ticks)))
    found = calibrate.calibrate([1], seconds=60.0)
    for size, images in ((8, 1), (20, 4), (33, 16)):
        wanted, got = (times.layer(SPEC, (size, size), images, 1) for times in (planted, found))
        assert got == pytest.approx(wanted, rel=0.05)
    with pytest.raises(DSPBackendError, match="not for 40"):
        calibrate.calibrate([1], seconds=3.0)
