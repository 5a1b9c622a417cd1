"""For the documentation site: the docstrings' conventions as Markdown.

Doctests become code blocks, and ``name: what it is`` at the beginning of a line becomes an item of a list.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(>>> .*(?:\n(?!\s*$).+)*)", re.MULTILINE)


class Conventions(griffe.Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            names = [
                parameter.name for parameter in getattr(obj, "parameters", ()) if parameter.name != "self"
            ]
            paragraphs = [_as_list(paragraph, names) for paragraph in obj.docstring.value.split("\n\n")]
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\1\n```", "\n\n".join(paragraphs))


def _as_list(paragraph: str, names: list[str]) -> str:
    name = rf"`*(?:{'|'.join(map(re.escape, names))})\b[^\s:]*(?:, [a-z_`]+)*"
    if not names or not re.match(f"{name}: ", paragraph):
        return paragraph
    lines = re.sub(rf"(?<=[.)]) ({name}: )", r"\n\1", paragraph).split("\n")
    items = [re.sub(rf"^({name}): ", r"* **\1**: ", line) for line in lines]
    return "\n".join(item if item.startswith("* ") else f"    {item.strip()}" for item in items)
