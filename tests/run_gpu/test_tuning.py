"""Tuning: what is measured, chosen, kept on disk; with a clock and timers that need no GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsp_kernels.errors import DSPError
from dsp_kernels.run.gpu.tune import Choices, Launch, Tuner, tuner_for
from dsp_kernels.whole_file import cached_file


class Machine:
    """A GPU on which options take the seconds of their names, and a clock that measuring moves on."""

    def __init__(self, file: Path, cost: float = 1.0) -> None:
        self.file, self.cost, self.now = file, cost, 0.0
        self.measured: list[str] = []

    def tuner(self) -> Tuner:
        return Tuner(Choices(self.file), self._seconds, "", budget=5.0, clock=lambda: self.now)

    def _seconds(self, launch: Launch) -> float:
        self.now += self.cost
        launch()
        return float(self.measured[-1])

    def options(self, *names: str) -> dict[str, Callable[[], Launch]]:
        def option(name: str) -> Callable[[], Launch]:
            def launch() -> None:
                if name == "broken":
                    raise RuntimeError("no kernel image")
                self.measured.append(name)

            return lambda: launch

        return {name: option(name) for name in names}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "folder" / "choices.json")


def test_the_fastest_is_chosen_once_and_kept_for_other_processes(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    options = machine.options("3", "1", "2")
    for key in ("conv", "conv", "other"):
        with machine.tuner() as tuner:
            assert tuner.fastest([key], options) == "1"
    assert machine.measured == ["3", "1", "2"] * 2
    assert capsys.readouterr().err.count("measuring kernels") == 2
    with machine.tuner() as tuner:  # other options: measured again
        assert tuner.fastest(["conv"], machine.options("3", "1", "0.5")) == "0.5"
        assert tuner.fastest(["single"], machine.options("7")) == "7"
    assert len(machine.measured) == 9


def test_after_the_budget_the_first_option_runs_until_the_next_process(machine: Machine) -> None:
    machine.cost = 2.0
    options = machine.options("3", "1", "2")
    with machine.tuner() as tuner:
        assert tuner.fastest(["a"], options) == "1"
        assert tuner.fastest(["b"], options) == "3"
        assert tuner.fastest(["network"], options, always=True) == "1"
    assert machine.measured == ["3", "1", "2"] * 2
    with machine.tuner() as tuner:
        assert [tuner.fastest([key], options) for key in "ab"] == ["1", "1"]
    assert len(machine.measured) == 9  # "a" was on disk
    machine.cost = 3.0
    with machine.tuner() as tuner:  # two of three in time: the better of them, for this process only
        assert tuner.fastest(["c"], machine.options("3", "2", "1")) == "2"
        assert tuner.fastest(["d"], machine.options("3", "2", "1")) == "3"


def test_options_that_do_not_run_are_left_out_with_a_warning(machine: Machine) -> None:
    with pytest.warns(UserWarning, match="broken does not run on this GPU: no kernel image"):
        assert machine.tuner().fastest(["a"], machine.options("broken", "2", "1")) == "1"
    both = {"first": machine.options("broken")["broken"], "PyTorch": machine.options("broken")["broken"]}
    with pytest.warns(UserWarning, match="no kernel image"):
        assert machine.tuner().fastest(["b"], both) == "PyTorch"  # the last resort


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100000,
        '{"version": 1}',
        '{"version": 1, "choices": [1]}',
        json.dumps({"version": 1, "choices": {"key": 1}}),
        json.dumps({"version": 2, "choices": {"key": "1"}}),
        json.dumps({"version": 1, "choices": {"key": "1"}}) + " " * (5 << 20),
        b"\xff\xfe\x00",
    ],
    ids=lambda text: str(text[:40]),
)
def test_damaged_files_count_as_empty(text: str | bytes, machine: Machine) -> None:
    machine.file.parent.mkdir()
    machine.file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(2):
        with machine.tuner() as tuner:
            assert tuner.fastest(["a"], machine.options("2", "1")) == "1"
    assert len(machine.measured) == 2
    assert [path.name for path in machine.file.parent.iterdir()] == [machine.file.name]


def test_a_name_on_disk_that_is_no_option_is_measured_again(machine: Machine) -> None:
    with machine.tuner() as tuner:
        tuner.fastest(["a"], machine.options("2", "1"))
    machine.file.write_text(machine.file.read_text().replace('"1"', '"deleted kernel"'))
    assert machine.tuner().fastest(["a"], machine.options("2", "1")) == "1"


def test_concurrent_writers_keep_both_choices_and_an_unwritable_folder_is_no_error(machine: Machine) -> None:
    first, second = machine.tuner(), machine.tuner()
    for tuner, key in ((first, "a"), (second, "b")):
        with tuner:
            tuner.fastest([key], machine.options("2", "1"))
    assert len(json.loads(machine.file.read_text())["choices"]) == 2
    machine.file = machine.file / "inside"
    with machine.tuner() as tuner:
        assert tuner.fastest(["a"], machine.options("2", "1")) == "1"


def test_nothing_is_measured_without_a_gpu_or_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {name: lambda: pytest.fail("measured") for name in ("rule", "other")}
    assert tuner_for(torch.device("cpu"), "").fastest(["a"], options) == "rule"
    monkeypatch.setenv("DSP_KERNELS_TUNE", "0")
    assert tuner_for(torch.device("cuda"), "").fastest(["a"], options, always=True) == "rule"
    monkeypatch.setenv("DSP_KERNELS_TUNE", "yes")
    with pytest.raises(DSPError, match="expected 0, 1 or all"):
        tuner_for(torch.device("cuda"), "")


def test_the_name_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_KERNELS_CACHE", "/somewhere")
    assert cached_file("NVIDIA H200/../x", "3.9.0") == Path("/somewhere/NVIDIA-H200-..-x-3.9.0.json")
    monkeypatch.delenv("DSP_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cached_file("a", "1").parent == Path("/cache/dsp-kernels")
