"""A result as one self-contained HTML file: tables, plots and the environment."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from .results import Result
from .tables import COLUMNS, cells, machine

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:110em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}
th,td{padding:.25em .5em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child,td:last-child{text-align:left}
th{position:sticky;top:0;background:#f3f4f6}tr:hover{background:#f8fafc}
td:last-child{white-space:normal;color:#666;min-width:26em}
tr.fused td:first-child{font-weight:600}img{max-width:100%;height:auto}
"""


def html_page(result: Result, plots: Mapping[str, bytes]) -> str:
    """The whole page. plots: PNG files by caption."""
    figures = ""
    for caption, png in plots.items():
        source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        text = escape(caption)
        figures += f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
    tables = ""
    for run in result.runs:
        tables += f"<h2>{escape(run.label)}, {escape(run.mode)}</h2>"
        if run.flop_ratio is not None:
            tables += f"<p>The FLOPs alone promise {run.flop_ratio:.2f} times the dense speed.</p>"
        tables += _table(COLUMNS, cells(run))
    about = _table(("environment", ""), [(key, str(value)) for key, value in result.environment.items()])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dsp-kernels benchmarks</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>dsp-kernels benchmarks</h1>'
        f"<p>{escape(machine(result))}</p>{figures}{tables}<h2>Machine</h2>{about}</body></html>\n"
    )


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for line in lines:
        fused = ' class="fused"' if "fused" in line[0] else ""
        body += f"<tr{fused}>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
