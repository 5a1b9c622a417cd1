"""Whole families and networks of timm: pruned, packed, fused, saved and exported, equal after every stage."""

import pytest
import torch
from families import FAMILIES
from stages import MOST_ENGINE_ERROR, MOST_ERROR, Outcome, run_all

for needed in ("torchvision", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(needed)

# Network -> steps of fuse() before the head that are plain PyTorch.
TIMM = {
    "lcnet_100": 135,
    "mobilenetv2_100": 255,
    "regnetx_002": 220,
    "ghostnet_100": 0,
    "dla34": 0,
    "levit_128s": 0,
}


def check(made: Outcome, plain: int) -> None:
    assert made.failed == {}
    assert made.errors.pop("packed") <= MOST_ERROR
    assert made.errors.pop("saved") == 0
    assert max(made.errors.values()) <= MOST_ENGINE_ERROR
    assert made.plain_before_head <= plain


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_after_every_stage(name: str) -> None:
    torch.manual_seed(0)
    make, side, plain = FAMILIES[name]
    check(run_all(name, make().double().eval(), side), plain)


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_right_after_every_stage(name: str) -> None:
    pytest.importorskip("timm")
    check(run_all(f"timm/{name}"), TIMM[name])
