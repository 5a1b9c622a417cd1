"""A result as one HTML file that needs no network: tables, pictures and the environment in it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from .results import Result
from .tables import COLUMNS, cells, machine

__all__ = ["html_page"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:110em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}
th,td{padding:.25em .5em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child,td:last-child{text-align:left}
th{position:sticky;top:0;background:#f3f4f6}tr:hover{background:#f8fafc}
td:last-child{white-space:normal;color:#666;min-width:26em}
tr.fused td:first-child{font-weight:600}img{max-width:100%;height:auto}
"""
_CAPTIONS = {
    "latency": "Latency over batch size, of each form the fastest engine and all of ours",
    "throughput": "Throughput over batch size",
    "speed_up": "Speed-up against FLOP ratio",
    "roofline": "Roofline: useful FLOP/s against arithmetic intensity, with the measured peak and bandwidth",
}


def html_page(result: Result, pictures: Mapping[str, bytes]) -> str:
    """The whole page. pictures: PNG files by name."""
    figures = "".join(
        f'<figure><img alt="{escape(_CAPTIONS.get(name, name))}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode("ascii")}"><figcaption>{escape(_CAPTIONS.get(name, name))}'
        "</figcaption></figure>"
        for name, png in pictures.items()
    )
    tables = "".join(
        f"<h2>{escape(run.label)}, {escape(run.mode)}</h2>{_flops(run.flop_ratio)}"
        f"{_table(COLUMNS, cells(run))}"
        for run in result.runs
    )
    about = _table(("environment", ""), [(key, str(value)) for key, value in result.environment.items()])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dsp-kernels benchmarks</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>dsp-kernels benchmarks</h1>'
        f"<p>{escape(machine(result))}</p>{figures}{tables}<h2>Machine</h2>{about}</body></html>\n"
    )


def _flops(ratio: float | None) -> str:
    return "" if ratio is None else f"<p>The FLOPs alone promise {ratio:.2f} times the dense speed.</p>"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr{_CLASS if 'fused' in line[0] else ''}>"
        + "".join(f"<td>{escape(text)}</td>" for text in line)
        + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_CLASS = ' class="fused"'
