"""The op's schema: by the extension where there is one, by Python where not, never by both, and equal."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from torch._C import parse_schema

from dsp_kernels.op.torch_op import NAMESPACE, OP_NAME, SCHEMA

TESTS = Path(__file__).resolve().parents[1]
WITHOUT = "import sys; sys.modules['dsp_kernels._C'] = None\n"


def run(code: str, extension: bool) -> str:
    """What the code prints in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS / "kernels")])}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code if extension else WITHOUT + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@cache
def registered(extension: bool) -> tuple[str, str, str]:
    """The schema, its tags and the file that registered it."""
    code = (
        "import torch, dsp_kernels\n"
        f"op = torch.ops.{NAMESPACE}.{OP_NAME}.default\n"
        f"lines = torch._C._dispatch_dump('{NAMESPACE}::{OP_NAME}').splitlines()\n"
        "print(op._schema, list(op.tags), next(n for n in lines if n.startswith('debug:')), sep='\\n')"
    )
    schema, tags, place = run(code, extension).splitlines()
    return schema, tags, place


def test_the_extension_registers_the_op() -> None:
    assert "csrc/torch_op.cpp" in registered(True)[2]


def test_python_registers_it_without_the_extension() -> None:
    assert "torch/library.py" in registered(False)[2]


def test_both_register_the_same() -> None:
    assert registered(True)[:2] == registered(False)[:2]
    assert parse_schema(registered(True)[0]) == parse_schema(f"{NAMESPACE}::{OP_NAME}{SCHEMA}")


def test_the_op_is_whole_without_the_extension() -> None:
    """What torch expects of an op, and one compiled graph, as with the extension in test_op.py."""
    code = (
        "import torch, test_op\n"
        "for case in test_op.OPCHECKED:\n"
        "    torch.library.opcheck(test_op.OP.default, test_op.raw_arguments(case, torch.float32, True))\n"
        "test_op.test_gradients(test_op.GRADIENTS[0])\n"
        "test_op.test_compiles_in_one_graph_with_any_batch()\n"
        "print('whole')"
    )
    assert run(code, extension=False).splitlines()[-1] == "whole"
