"""Whole families of networks: pruned, packed, fused, saved and exported, equal after every stage."""

import pytest
import torch
from families import FAMILIES, check
from stages import run_all

for needed in ("torchvision", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(needed)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_after_every_stage(name: str) -> None:
    torch.manual_seed(0)
    make, side, plain = FAMILIES[name]
    check(run_all(name, make().double().eval(), side), plain)
