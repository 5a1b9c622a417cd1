"""pack on what forward() takes: several inputs, options, and examples that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_packing_models as cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPFormatError, DSPShapeError, DSPTraceError, DSPVerificationError
from dsp_pruning import GroupWrapper, PruneWrapper, pack
from dsp_pruning.packing.unpack import unpack


class Two(cases.Net):
    """An image, a vector of features, and optional arguments that are never passed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, cases.WIDTH)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None, raw: bool = False) -> Tensor:
        y = F.relu(self.norm(self.a(x)))
        if mask is not None:
            y = y * mask
        y = y * torch.sigmoid(self.embed(features))[:, :, None, None]
        return y if raw else self.head(y)


def two_inputs() -> tuple[Tensor, Tensor]:
    return cases.images(), torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_several_inputs(tmp_path: Path) -> None:
    model, given = cases.masked(Two()), two_inputs()
    packed = pack(model, given)
    assert packed.a.out_channels == packed.embed.out_features == cases.WIDTH - 3
    assert cases.agree(model(*given), packed(*given))
    dense = unpack(packed)
    assert dense.embed.weight.shape == (cases.WIDTH, 5)
    assert cases.agree(model(*given), dense(*given))

    dsp_kernels.save(packed, tmp_path / "net", given)
    loaded = dsp_kernels.load(tmp_path / "net")
    assert loaded.example_shapes == ((1, 3, 8, 8), (1, 5))
    assert torch.equal(loaded(*given), packed(*given))
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    with pytest.raises(DSPFormatError, match="takes 2 inputs; pass"):
        dsp_kernels.save(packed, tmp_path / "other")
    with pytest.raises(DSPFormatError, match="takes 2 inputs, the example has 1"):
        dsp_kernels.save(packed, tmp_path / "other", given[0])
    with pytest.raises(DSPTraceError):
        dsp_kernels.fuse(packed, given[0])


def test_optional_arguments_keep_their_defaults() -> None:
    """torch.fx alone would take ``mask is not None`` for true."""

    class Optional(cases.Net):
        def forward(self, x: Tensor, mask: Tensor | None = None, raw: bool = False) -> Tensor:
            y = F.relu(self.norm(self.a(x)))
            y = y if mask is None else y * mask
            return y if raw else self.head(y)

    model, x = cases.masked(Optional()), cases.images()
    packed = pack(model, x)
    assert packed.a.out_channels == cases.WIDTH - 3
    assert cases.agree(model(x), packed(x))
    assert cases.agree(model(x), dsp_kernels.fuse(packed, x, dtype=torch.float64)(x))


def test_an_example_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(
        DSPTraceError, match=r"shape \(2, 2, 8, 8\) and dtype torch.float64, at 'a'"
    ) as caught:
        pack(cases.masked(cases.Net()), cases.images(2))
    assert "tlparse" not in str(caught.value)


def test_an_example_with_more_than_the_model_takes_is_named() -> None:
    class Exactly(Two):
        def forward(self, x: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, features)

    image, features = two_inputs()
    with pytest.raises(
        DSPShapeError, match=r"Exactly.forward\(\) takes 2 inputs; input 3 .* \(2, 5\), has no"
    ):
        pack(cases.masked(Exactly()), (image, features, features))
    with pytest.raises(DSPShapeError, match=r"input 2 of the example, of shape \(2, 5\), has no place"):
        pack(cases.masked(cases.Net()), (image, features))
    with pytest.raises(DSPShapeError, match="input 2 of the example is a float"):
        pack(cases.masked(Two()), (image, 1.0))  # type: ignore[arg-type]


def test_an_example_on_another_device_is_refused() -> None:
    with pytest.raises(DSPShapeError, match="the example is on meta; expected cpu"):
        pack(cases.masked(cases.Net()), cases.images().to("meta"))


@pytest.mark.parametrize("second_order", ["exact", "original", "none"])
def test_learn_prune_and_pack_with_several_inputs(second_order: str) -> None:
    class Deep(Two):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(cases.WIDTH, cases.WIDTH, 3, padding=1)

        def forward(self, x: Tensor, features: Tensor) -> Tensor:
            y = F.relu(self.norm(self.a(x))) * torch.sigmoid(self.embed(features))[:, :, None, None]
            return self.head(F.relu(self.c(y)))

    torch.manual_seed(0)
    model, given = Deep().double(), two_inputs()
    target = torch.zeros_like(model(*given))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wrapper = GroupWrapper(
        model,
        optimizer,
        F.mse_loss,
        1e-2,
        2,
        2,
        1.0,
        example_input=given,
        second_order=second_order,  # type: ignore[arg-type]
    )
    for _ in range(2):
        wrapper.initialize()
        optimizer.zero_grad()
        F.mse_loss(wrapper(*given), target).backward()
        optimizer.step()
        before = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".group")}
        wrapper.after_step(given, target)
        assert before
        assert not any(torch.equal(model.get_parameter(name), logits) for name, logits in before.items())
    pruner = PruneWrapper(model, 2, 1, example_input=given)
    assert pruner.initialize(0.4)[0] >= 40
    packed = pack(pruner, given).eval()
    assert cases.agree(model.eval()(*given), packed(*given))
    with pytest.raises(DSPShapeError, match="input 2 of the example is a int"):
        PruneWrapper(model, 2, 1, example_input=(given[0], 5))  # type: ignore[arg-type]
    with pytest.raises(DSPShapeError, match="or a tuple of all inputs"):
        PruneWrapper(model, 2, 1)


def test_weights_that_are_nan_are_named() -> None:
    model = cases.masked(cases.Net())
    with torch.no_grad():
        model.linear.weight[0] = float("nan")
    with pytest.raises(
        DSPVerificationError, match=r"itself answers the example .*'linear\.weight' is not finite"
    ):
        pack(model, cases.images())


def test_integer_images_are_an_example() -> None:
    model, image = cases.masked(cases.Net()), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert len(PruneWrapper(model, 2, 1, example_input=image).layers) == 1
