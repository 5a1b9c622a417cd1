"""Whole families and networks of timm: pruned, packed, fused, saved and exported, equal after every stage."""

import pytest
import torch
from families import FAMILIES
from stages import Outcome, run_all

for needed in ("torchvision", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(needed)

TIMM = ("lcnet_100", "mobilenetv2_100", "regnetx_002", "ghostnet_100", "fastvit_t8", "levit_128s")


def check(made: Outcome, plain: int, refused: tuple[str, ...] = ()) -> None:
    assert set(made.failed) <= set(refused)
    assert made.errors.pop("packed") <= 1e-10
    assert made.errors.pop("saved") == 0
    assert max(made.errors.values()) <= 1e-4
    assert made.plain <= plain


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_after_every_stage(name: str) -> None:
    torch.manual_seed(0)
    make, side, plain = FAMILIES[name]
    refused = ("fused",) if name == "FPN" else ()  # its answer is a tuple
    check(run_all(name, make().double().eval(), side), plain, refused)


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_right_after_every_stage(name: str) -> None:
    pytest.importorskip("timm")
    check(run_all(f"timm/{name}"), 0)
