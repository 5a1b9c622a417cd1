"""``compare``: few false alarms, few misses, and never across machines unless asked."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dsp_benchmarks.cli import main
from dsp_benchmarks.measure.samples import Samples, median_interval, ratio_interval
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.report.compare import compare_results, compare_samples
from dsp_benchmarks.report.results import Result, read_result, write_result
from fakes import made_row

from dsp_kernels.errors import DSPError

NOISE = Path(__file__).with_name("noise.json")


def _drawn(noise: list[list[float]], generator: random.Random, scale: float = 1.0) -> Samples:
    """Rounds drawn from measured ones: calls of one round stay together."""
    chosen = [generator.choice(noise) for _ in range(TimingRules().rounds)]
    return Samples(tuple(scale * value for calls in chosen for value in calls), len(noise[0]))


@pytest.fixture(scope="module")
def noises() -> dict[str, list[list[float]]]:
    """Rounds of calls over their median, measured on this project's machine: see the file's "about"."""
    return json.loads(NOISE.read_text())["rounds"]


@pytest.mark.parametrize("name", ["openvino", "fused:eager"])
def test_error_rates_on_measured_noise(noises: dict[str, list[list[float]]], name: str) -> None:
    noise, generator = noises[name], random.Random(1)

    def verdicts(scale: float) -> list[str]:
        pairs = ((_drawn(noise, generator), _drawn(noise, generator, scale)) for _ in range(100))
        return [compare_samples(name, *pair).verdict for pair in pairs]

    assert sum(verdict in ("slower", "faster") for verdict in verdicts(1.0)) <= 2
    assert verdicts(1.1).count("slower") >= 98


def test_verdicts() -> None:
    first = made_row("packed", "a", 1, 1.0).timed
    assert compare_samples("x", first, made_row("packed", "a", 1, 0.9).timed).verdict == "faster"
    assert compare_samples("x", first, made_row("packed", "a", 1, 1.02).timed).verdict == "same"
    wild = Samples((1.0, 3.0) * 10)
    assert compare_samples("x", first, wild).verdict.startswith("no verdict: the median")


def test_intervals_by_hand() -> None:
    assert median_interval(range(1, 101)) == (41, 60)
    # 10 and 10 values: rank floor(50 - 1.96 * sqrt(100 * 21 / 12)) = 24 of 100 sorted ratios.
    a, b = [1.5**i for i in range(10)], [1.5**i for i in range(3, 13)]
    ratios = sorted(y / x for x in a for y in b)
    assert ratio_interval(a, b) == pytest.approx((ratios[24], 1.5**3, ratios[75]))
    assert ratio_interval([1.0] * 4, [2.0] * 4, 0.999) == (0, pytest.approx(2), float("inf"))  # too few


def _slower(result: Result) -> Result:
    run = result.runs[0]
    rows = tuple(
        replace(row, samples=Samples(tuple(1.2 * s for s in row.timed.seconds), 3))
        if row.engine == "packed/fused:eager"
        else row
        for row in run.rows
    )
    return replace(result, runs=(replace(run, rows=rows),))


@pytest.fixture
def files(result: Result, tmp_path: Path) -> Callable[[Result], list[str]]:
    def write(second: Result) -> list[str]:
        pair = (tmp_path / "a.json", result), (tmp_path / "b.json", second)
        return [str(write_result(path, one)) for path, one in pair]

    return write


def test_the_exit_status_tells_whether_anything_is_slower(
    result: Result, files: Callable[[Result], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files(result)]) == 0
    assert "0 slower, 0 without verdict, of 9" in capsys.readouterr().out
    assert main(["compare", *files(_slower(result))]) == 1
    out = capsys.readouterr().out
    assert "2 slower" in out
    assert "1.200" in out
    assert main(["compare", *reversed(files(_slower(result)))]) == 0  # faster is not a failure


def test_results_of_different_machines_are_refused_unless_asked_for(
    result: Result, files: Callable[[Result], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(result, environment=result.environment | {"processor": "Another", "threads": 8})
    assert main(["compare", *files(other)]) == 2
    error = capsys.readouterr().err
    assert "processor: A processor and Another; threads: 2 and 8" in error
    assert error.count("\n") == 1
    assert main(["compare", *files(other), "--other-machine"]) == 0


def test_results_without_anything_in_common_are_refused(result: Result) -> None:
    other = replace(result, runs=(replace(result.runs[0], name="other"),))
    with pytest.raises(DSPError, match="have no engine"):
        compare_results(result, other)


def test_a_result_is_read_back_as_it_was_written(result: Result, tmp_path: Path) -> None:
    path = write_result(tmp_path / "new" / "a.json", result)
    read = read_result(path)
    assert (read.environment, read.peaks) == (result.environment, result.peaks)
    for row, before in zip(read.runs[0].rows, result.runs[0].rows, strict=True):
        assert replace(row, samples=None) == replace(before, samples=None)
        if before.samples is not None:
            assert row.timed.seconds == pytest.approx(before.samples.seconds, rel=1e-5)
            assert row.timed.per_round == 3
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    assert max(len(line) for line in path.read_text().splitlines()) > 500  # samples on one line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "runs": [{}]}'])
def test_a_file_that_is_not_a_result_is_an_error_of_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert main(["compare", str(path), str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    assert main(["report", str(tmp_path / "none.json")]) == 2
