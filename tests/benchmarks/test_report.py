"""Tables, plots and the page; the README's table equals the committed result."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from dsp_benchmarks.cli import README, README_RESULT, main
from dsp_benchmarks.report.plots import draw_plots
from dsp_benchmarks.report.results import Result, read_result, write_result
from dsp_benchmarks.report.tables import COLUMNS, README_MARKERS, cells, put_into_readme, summary

from dsp_kernels.errors import DSPFormatError


def _column(result: Result, name: str) -> dict[tuple[str, str], str]:
    place = COLUMNS.index(name)
    return {(line[0], line[1]): line[place] for line in cells(result.runs[0])}


def test_cells_hold_speed_ups_over_the_fastest_dense_float32_engine_floor_and_reasons(result: Result) -> None:
    faster, ideal = _column(result, "times faster"), _column(result, "ideal")
    assert float(faster["dense/openvino", "1"]) == 1
    assert float(faster["packed/fused:eager", "1"]) == pytest.approx(2, rel=0.01)
    assert float(faster["packed/fused:eager", "8"]) == pytest.approx(3, rel=0.01)
    assert float(faster["dense/openvino-bf16", "1"]) == pytest.approx(4, rel=0.01)
    assert ideal["packed/fused:eager", "1"] == "2.50"
    assert ideal["dense/torch", "1"] == "1.00"
    assert _column(result, "% of floor")["packed/fused:eager", "8"] == "25"
    assert float(_column(result, "images/s")["packed/fused:eager", "8"]) == pytest.approx(800, rel=0.01)
    notes = _column(result, "note")
    assert notes["dense/tensorrt", "1"] == "unavailable: the package x | y is missing"
    assert notes["packed/compile", "1"] == "skipped: takes long"
    assert all(len(line) == len(COLUMNS) for line in cells(result.runs[0]))


def test_unstable_samples_are_marked(result: Result) -> None:
    run = result.runs[0]
    samples = replace(run.rows[0].timed, seconds=(1.0, 3.0) * 30, per_round=1)
    one = replace(result, runs=(replace(run, rows=(replace(run.rows[0], samples=samples), *run.rows[1:])),))
    assert "no verdict: the median is known only" in _column(one, "note")["dense/torch", "1"]
    ours = next(row for row in run.rows if row.engine == "packed/fused:cpu")
    rows = [replace(row, samples=samples) if row is ours else row for row in run.rows]
    assert "| ~2e+03 |" in summary(replace(result, runs=(replace(run, rows=tuple(rows)),)))
    assert "too much for a verdict" not in summary(result)


def test_a_busy_machine_is_noted(result: Result, tmp_path: Path) -> None:
    run = result.runs[0]
    rows = [replace(row, samples=replace(row.timed, busy=1.42)) for row in run.rows[:1]]
    rows += [replace(row, samples=replace(row.timed, busy=1.1)) for row in run.rows[1:2]]
    path = write_result(tmp_path / "a.json", replace(result, runs=(replace(run, rows=tuple(rows)),)))
    read = read_result(path)
    assert list(_column(read, "note").values()) == ["the machine was busy: x1.4", ""]
    assert "a fixed computation beside the calls took up to x1.4 of its best" in summary(read)
    assert "busy" not in summary(result)


def test_a_report_is_a_page_and_tables_beside_the_result(result: Result, tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", result)
    assert main(["report", str(path)]) == 0
    text = (tmp_path / "a.md").read_text()
    assert text.count("\n| dense/torch |") == 2
    assert "x \\| y" in text  # a pipe would begin a new cell
    plots = draw_plots(read_result(path))
    assert [caption.split()[0].strip(":") for caption in plots] == ["Latency", "Roofline"]
    assert all(png[:4] == b"\x89PNG" for png in plots.values())
    page = (tmp_path / "a.html").read_text()
    assert [page.count(text) for text in ("data:image/png", "<table>", '<tr class="fused">')] == [2, 2, 4]
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained


def test_the_readme_gets_the_table_between_its_markers(result: Result, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    start, end = README_MARKERS
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    path = str(write_result(tmp_path / "a.json", result))
    assert main(["report", path, "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| resnet56_g4")]
    assert [line[:2] for line in lines] == [["resnet56_g4", "1"], ["resnet56_g4", "8"]]
    for line, dense, native in zip(lines, (4, 30), (1, 5), strict=True):
        median, engine = line[2].split()
        assert (float(median), float(line[4])) == pytest.approx((dense, native), rel=0.02)
        assert engine == "(openvino)"
        assert (line[3], line[5], line[6]) == ("-", "-", "-")  # not measured: released form, integers
        assert float(line[7].rstrip("x")) == pytest.approx(dense / native, rel=0.02)
        assert line[8:] == ["-", "-", "2.50x", "25 %"]
    assert put_into_readme(text, read_result(path)) == text
    readme.write_text("no markers")
    assert main(["report", path, "--readme", str(readme)]) == 2
    with pytest.raises(DSPFormatError, match="no place for results"):
        put_into_readme("", result)


def test_the_readme_equals_the_committed_result() -> None:
    """``python -m dsp_benchmarks report --readme`` makes it so."""
    text = README.read_text(encoding="utf-8")
    assert put_into_readme(text, read_result(README_RESULT)) == text
