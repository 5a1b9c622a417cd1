"""Networks of timm: pruned, packed, fused, saved and exported, equal after every stage."""

import pytest
from families import check
from stages import run_all

for needed in ("torchvision", "onnxscript", "onnxruntime", "openvino", "timm"):
    pytest.importorskip(needed)

TIMM = ("lcnet_100", "mobilenetv2_100", "regnetx_002", "fastvit_t8", "levit_128s")


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_right_after_every_stage(name: str) -> None:
    check(run_all(f"timm/{name}"), 0)
