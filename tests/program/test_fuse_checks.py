"""fuse: what it refuses, and that it never returns a network with other answers."""

from collections.abc import Callable

import nets
import pytest
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPBackendError, DSPShapeError, DSPTraceError, DSPVerificationError


@pytest.mark.parametrize(
    ("hook", "example", "where"),
    [
        (lambda *call: call[-1] + 0.01, nets.example(), "the example input"),
        (lambda *call: call[-1] * 1.1, torch.zeros(1, 3, 8, 8), "random images"),  # zeros hide the factor
    ],
    ids=["offset", "factor"],
)
def test_other_answers_than_the_model_are_refused(
    hook: Callable[..., Tensor], example: Tensor, where: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    model[0].register_forward_hook(hook)  # a Program does not see it
    with pytest.raises(DSPVerificationError, match=f"differs from the model on {where}"):
        dsp_kernels.fuse(model, example)


def test_autocast_of_the_caller_does_not_matter() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    with torch.no_grad():
        torch.testing.assert_close(
            fused(nets.example()), nets.make("residual")(nets.example()), rtol=1e-4, atol=1e-5
        )


def test_wrong_inputs_of_a_fused_network() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    with pytest.raises(DSPShapeError, match="expected \\(batch, 3, height, width\\)"):
        fused(torch.zeros(1, 4, 8, 8))
    with pytest.raises(DSPShapeError, match="floating dtype"):
        fused(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(DSPShapeError, match="on cpu"):
        fused(torch.zeros(1, 3, 8, 8, device="meta"))
    with pytest.raises(DSPShapeError, match="is a ndarray; expected a tensor"):
        fused(nets.example().numpy())
    with pytest.raises(DSPShapeError, match="2 inputs; this network takes 1"):
        fused(IMAGE, FEATURES)
    two = dsp_kernels.fuse(_Two(), (IMAGE, FEATURES))
    with pytest.raises(DSPShapeError, match=r"shape \(2, 3\); expected \(batch, 4\), and one batch in all"):
        two(IMAGE, FEATURES[:, :3])
    with pytest.raises(DSPShapeError, match=r"shape \(1, 4\); expected \(batch, 4\), and one batch in all"):
        two(IMAGE, FEATURES[:1])


IMAGE, FEATURES = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(12, 5)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return self.classifier(torch.cat([self.conv(image).relu().mean((2, 3)), features], 1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((IMAGE, FEATURES[:1]), "input 2 of the example has shape (1, 4) and dtype torch.float32"),
        ((IMAGE, FEATURES.long()), "input 2 of the example has shape (2, 4) and dtype torch.int64"),
        ((IMAGE, IMAGE[0]), "input 2 of the example has shape (3, 8, 8) and"),
        ((IMAGE, None), "input 2 of the example is a NoneType; expected a tensor"),
        ((IMAGE, torch.tensor(1.0)), "input 2 of the example has shape (); expected"),
        ((IMAGE[:0], FEATURES), "input 1 of the example has shape (0, 3, 8, 8)"),
        ((), "the example is an empty tuple"),
        ({"image": IMAGE}, "the example is a dict; expected a tensor"),
        (IMAGE[0], "input 1 of the example has shape (3, 8, 8) and dtype torch.float32; expected (batch,"),
        ((IMAGE.to("meta"),), "the example is on meta; expected cpu"),
    ],
    ids=["batch", "integers", "rank", "none", "number", "empty", "nothing", "dict", "no-batch", "elsewhere"],
)
def test_wrong_examples(given: object, words: str) -> None:
    for model in (_Two(), nets.make("residual")):
        with pytest.raises(DSPShapeError) as caught:
            dsp_kernels.fuse(model, given)  # type: ignore[arg-type]
        assert words in str(caught.value)


def test_the_example_may_be_a_tuple_of_one_image() -> None:
    model, image = nets.make("residual"), nets.example()
    fused = dsp_kernels.fuse(model, (image,))
    torch.testing.assert_close(fused(image), model(image), rtol=1e-4, atol=1e-5)


def test_networks_that_cannot_be_fused() -> None:
    with pytest.raises(DSPTraceError, match="Undecided cannot be traced"):
        dsp_kernels.fuse(nets.Undecided(), nets.example())
    with pytest.raises(DSPTraceError, match="answers with tensors, this one returns none"):
        dsp_kernels.fuse(nets.Answers(lambda *maps: [1, None]), nets.example())
    with pytest.raises(DSPTraceError, match=r"this one returns a slice; use swap\(\)"):
        dsp_kernels.fuse(nets.Answers(lambda *maps: (maps[0], slice(2))), nets.example())
    with pytest.raises(DSPShapeError, match=r"takes 1 input; input 2 of the .* has no place"):
        dsp_kernels.fuse(nets.make("residual"), (IMAGE, FEATURES))
    with pytest.raises(DSPTraceError, match=r"example input of shape \(2, 3, 8, 8\) and .*\(2, 3\) and"):
        dsp_kernels.fuse(_Two(), (IMAGE, FEATURES[:, :3]))
    with pytest.raises(DSPTraceError, match="does not run on an example input of shape \\(2, 5, 8, 8\\)"):
        dsp_kernels.fuse(nets.make("residual"), torch.zeros(2, 5, 8, 8))
    with pytest.raises(DSPTraceError, match=r"The weights are torch.float32: .* fuse\(..., dtype=...\)"):
        dsp_kernels.fuse(nets.make("residual"), nets.example().bfloat16())
    with pytest.raises(DSPBackendError, match="the network is on cpu; move it"):
        dsp_kernels.fuse(nets.make("residual"), nets.example(), backend="cuda")
    with pytest.raises(DSPBackendError, match="'warp' is unknown"):
        dsp_kernels.fuse(nets.make("residual"), nets.example(), backend="warp")
    with pytest.raises(DSPBackendError, match=r"expected a torch\.dtype, as torch\.bfloat16"):
        dsp_kernels.fuse(nets.make("residual"), nets.example(), dtype="bfloat16")  # type: ignore[arg-type]


def test_a_failed_move_changes_nothing() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    if fused.backend == "eager":
        pytest.skip("the eager executor runs every dtype")
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=fused.backend)
    expected = fused(nets.example())
    with pytest.raises(DSPBackendError):
        fused.double()
    assert torch.equal(fused(nets.example()), expected)


def test_a_float32_model_in_float64_is_compared_as_float32() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example(), dtype=torch.float64, backend="eager")
    assert fused.dtype == torch.float64
