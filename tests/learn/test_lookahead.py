"""The look-ahead: the step it takes, that it changes nothing, mixed precision and memory formats."""

import copy

import pytest
import torch
import torch.nn.functional as F
from learning_setup import LAYERS, MODES, OPTIMIZERS, Setup, everything, regulariser
from nets import ToyA
from torch import Tensor, nn

from dsp_pruning.learn.lookahead import LookAhead, look_ahead
from dsp_pruning.learn.penalty import layer_scale


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_look_ahead_changes_nothing(optimizer: str) -> None:
    """Without a penalty (reg 0) the step may change the logits and nothing else."""
    setup = Setup(optimizer, reg=0.0)
    for _ in range(2):
        setup.forward_and_step()
        before = everything(setup)
        setup.learner.after_step(setup.x, setup.y)
        after = everything(setup)
        assert before.keys() == after.keys()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == {f"state/{name}.group" for name in LAYERS}
        assert all(setup.model.get_submodule(name).group.grad is None for name in LAYERS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_look_ahead_is_the_next_step(optimizer: str) -> None:
    setup = Setup(optimizer)
    setup.step()
    setup.forward_and_step()
    twin_model = copy.deepcopy(setup.model)
    twin_optimizer = OPTIMIZERS[optimizer](p for p in twin_model.parameters() if p.requires_grad)
    twin_optimizer.load_state_dict(copy.deepcopy(setup.optimizer.state_dict()))
    twin_optimizer.zero_grad()
    weight = setup.model.conv2.weight
    with torch.no_grad():
        twin_model.conv2.weight.mul_(0.5)
    ahead = look_ahead(
        setup.model, setup.optimizer, F.cross_entropy, {weight: weight.detach() * 0.5}, [(setup.x, setup.y)]
    )
    loss = F.cross_entropy(twin_model(setup.x), setup.y)
    loss.backward()
    twin_optimizer.step()
    assert torch.equal(ahead.loss, loss.detach())
    assert torch.equal(ahead.weights[weight], twin_model.conv2.weight.detach())


def test_hooks_and_schedulers_are_not_called_by_the_look_ahead() -> None:
    setup = Setup()
    calls: list[str] = []
    setup.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    setup.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(setup.optimizer, 1, 0.5)
    setup.step()
    scheduler.step()
    assert calls == ["before", "after"]
    assert setup.optimizer.param_groups[0]["lr"] == 0.025


def test_dropout_in_the_look_ahead_does_not_change_the_random_state() -> None:
    model = nn.Sequential(ToyA(), nn.Dropout(0.5))
    setup = Setup(model=model)
    setup.forward_and_step()
    before = torch.get_rng_state()
    setup.learner.after_step(setup.x, setup.y)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_differ_and_none_takes_no_forward() -> None:
    forwards: dict[str, int] = {}
    logits: dict[str, Tensor] = {}
    for mode in MODES:
        setup = Setup(second_order=mode)
        for _ in range(3):
            setup.forward_and_step()
            calls: list[int] = []
            handle = setup.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            setup.learner.after_step(setup.x, setup.y)
            handle.remove()
        forwards[mode] = len(calls)
        logits[mode] = torch.cat([value.flatten() for value in setup.logits()])
    assert forwards == {"exact": 1, "none": 0, "original": 1}
    assert not torch.equal(logits["exact"], logits["none"])
    assert not torch.equal(logits["exact"], logits["original"])


def test_exact_mode_follows_the_derivative() -> None:
    """The logits' gradient is that of R at the weights one step ahead plus the mixed term, by autograd."""
    setup = Setup(model=ToyA().double(), optimizer="sgd")
    setup.x = setup.x.double()
    noise = {name: torch.zeros(3, setup.model.get_submodule(name).out_channels) for name in LAYERS}
    setup.forward_and_step(noise)
    logits = {name: setup.model.get_submodule(name).group.detach().clone() for name in LAYERS}
    weights = {name: setup.model.get_submodule(name).weight.detach().clone() for name in LAYERS}
    scales = {
        info.name: layer_scale(info.in_channels, info.out_channels, info.kernel_size, info.input_hw, 3)
        for info in setup.learner.layers.chosen
    }
    probs = {name: torch.softmax(logits[name] / 0.5, dim=0).requires_grad_() for name in LAYERS}

    def shrink(name: str, weight: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()
        (slope,) = torch.autograd.grad(regulariser(probs[name].detach(), weight), weight)
        return weight.detach() - 0.05 * 0.05 / 10 * scales[name] * slope  # reg * lr * ramp

    twin = copy.deepcopy(setup.model)
    shrunk = {name: shrink(name, weights[name]) for name in LAYERS}
    with torch.no_grad():
        for name in LAYERS:
            twin.get_submodule(name).weight.copy_(shrunk[name])
    twin.zero_grad()
    F.cross_entropy(twin(setup.x), setup.y).backward()
    setup.learner.after_step(setup.x, setup.y)
    moments = setup.learner.state_dict()["group_optimizer"]["state"]
    for index, name in enumerate(LAYERS):
        conv, prob = twin.get_submodule(name), probs[name]
        ahead = (conv.weight - 0.05 * conv.weight.grad).detach()
        direction = shrink(name, ahead) - shrunk[name]
        (first,) = torch.autograd.grad(regulariser(prob, ahead), prob)
        weight = weights[name].clone().requires_grad_()
        (by_weight,) = torch.autograd.grad(regulariser(prob, weight), weight, create_graph=True)
        (second,) = torch.autograd.grad((by_weight * direction).sum(), prob)
        raw = logits[name].clone().requires_grad_()
        (torch.softmax(raw / 0.5, dim=0) * (first + second)).sum().backward()
        found = moments[index]["exp_avg"] / 0.1  # Adam's first step: (1 - beta1) * gradient
        # The default eps of the first-order term, 1e-8 / (p S), remains.
        assert float((found - raw.grad).abs().max()) <= 1e-6 * float(raw.grad.abs().max())


class TestMixedPrecision:
    """Autocast in bfloat16 on the CPU, with and without a gradient scaler."""

    def train(
        self, setup: Setup, scaler: torch.amp.GradScaler, late: bool = False, spoil: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step, with an overflow if ``spoil``; all state before and after the learner's part."""
        setup.learner.initialize()
        setup.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(setup.learner(setup.x), setup.y)
        scaler.scale(loss).backward()
        if spoil:
            setup.model.fc.weight.grad[0, 0] = float("inf")
        scaler.step(setup.optimizer)
        if not late:
            scaler.update()
        before = everything(setup)
        setup.learner.after_step(setup.x, setup.y, True, scaler)
        if late:
            scaler.update()
        return before, everything(setup)

    @pytest.mark.parametrize("second_order", ["none", "exact"])
    @pytest.mark.parametrize("optimizer", ["momentum", "adam-fused"])
    @pytest.mark.parametrize("late", [False, True])
    def test_an_overflow_changes_nothing_but_the_step_count(
        self, optimizer: str, late: bool, second_order: str
    ) -> None:
        setup = Setup(optimizer, second_order=second_order)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.train(setup, scaler, late)
        moments = copy.deepcopy(setup.learner.state_dict()["group_optimizer"])
        before, after = self.train(setup, scaler, late, spoil=True)
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        torch.testing.assert_close(setup.learner.state_dict()["group_optimizer"], moments, rtol=0, atol=0)
        assert scaler.get_scale() == 512.0
        before, after = self.train(setup, scaler, late)
        assert not torch.equal(before["state/conv1.group"], after["state/conv1.group"])
        stats = setup.learner.stats()
        assert (stats["step"], stats["skipped_steps"]) == (3, 1)

    def test_the_scaler_is_updated_by_the_caller_only(self) -> None:
        setup, scaler = Setup(), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        scales = []
        for _ in range(4):
            self.train(setup, scaler)
            scales.append(scaler.get_scale())
        assert scales == [8.0, 8.0, 16.0, 16.0]

    def test_the_scale_leaves_no_trace_in_the_look_ahead(self) -> None:
        setup = Setup()
        setup.forward_and_step()
        weight = setup.model.conv2.weight
        step = setup.model, setup.optimizer, F.cross_entropy, {weight: weight}, [(setup.x, setup.y)]
        plain = look_ahead(*step)
        scaled = look_ahead(*step, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
        assert scaled.overflow is not None
        assert scaled.overflow.item() == 0
        # A power of two only moves the exponent.
        assert torch.equal(plain.weights[weight], scaled.weights[weight])
        assert torch.equal(plain.loss, scaled.loss)

    def test_an_overflow_of_the_look_ahead_alone_is_skipped_too(self) -> None:
        setup, scaler = Setup(), torch.amp.GradScaler("cpu", init_scale=float("inf"))
        setup.forward_and_step()
        before = everything(setup)
        setup.learner.after_step(setup.x, setup.y, False, scaler)
        assert setup.learner.stats()["skipped_steps"] == 1
        assert all(torch.equal(value, before[key]) for key, value in everything(setup).items())

    def test_the_terms_are_never_computed_in_half_precision(self) -> None:
        logits = []
        for outer in (False, True):
            setup = Setup(second_order="none")
            setup.forward_and_step()
            with torch.autocast("cpu", torch.bfloat16, enabled=outer):
                setup.learner.after_step(setup.x, setup.y)
            logits.append(setup.logits())
        assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))

    def test_autocast_is_used_where_it_is_asked_for(self) -> None:
        dtypes: list[torch.dtype] = []
        for amp in (True, False):
            setup = Setup()
            setup.forward_and_step()
            handle = setup.model.conv1.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
            with torch.autocast("cpu", torch.bfloat16, enabled=not amp):
                setup.learner.after_step(setup.x, setup.y, amp)
            handle.remove()
            assert setup.model.conv1.weight.dtype == torch.float32
        assert dtypes == [torch.bfloat16, torch.float32]


class _TwoNames(nn.Module):
    """Every module has two names; two convs share one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.features = nn.Sequential(self.first, self.norm, self.second, self.norm, nn.ReLU(), self.third)
        self.classifier = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("second_order", MODES)
def test_a_module_with_two_names_keeps_its_tensors_and_trains(second_order: str) -> None:
    setup = Setup(model=_TwoNames(), second_order=second_order, example_input=torch.zeros(1, 3, 16, 16))
    before = {
        name: id(tensor) for name, tensor in (*setup.model.named_parameters(), *setup.model.named_buffers())
    }
    start = {name: parameter.detach().clone() for name, parameter in setup.model.named_parameters()}
    for _ in range(3):
        setup.step()
        named = (*setup.model.named_parameters(), *setup.model.named_buffers())
        assert {name: id(tensor) for name, tensor in named} == before
    for name, parameter in setup.model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert not torch.equal(parameter, start[name]), name


def test_an_error_of_the_network_itself_is_raised() -> None:
    setup = Setup()
    setup.forward_and_step()
    with pytest.raises(RuntimeError, match=r"size|shape"):
        setup.learner.after_step(setup.x[:, :2], setup.y)
    assert setup.model.conv2.weight.is_contiguous()


class Picky(nn.Module):
    """Records whether its input is contiguous, and may refuse one that is not."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.seen: list[bool] = []
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.is_contiguous())
        if self.refuses and not self.seen[-1]:
            raise ValueError("my kernels read channels first")
        if len(x) > 8:
            raise RuntimeError("too many images")
        return self.fc(self.conv(x).relu().mean((2, 3)))


def ahead(model: Picky, x: Tensor) -> LookAhead:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = torch.zeros(len(x), dtype=torch.long)
    return look_ahead(
        model, optimizer, F.cross_entropy, {model.conv.weight: model.conv.weight}, [(x, y)], reorder=True
    )


@pytest.mark.parametrize("refuses", [True, False])
def test_any_error_about_the_memory_format_falls_back(refuses: bool) -> None:
    model, x = Picky(refuses), torch.randn(4, 3, 8, 8)
    found = ahead(model, x)
    assert found.refused == refuses
    assert model.seen == ([False, True] if refuses else [False])
    expected = F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found.loss, expected.detach())


def test_the_learner_tries_channels_last_once() -> None:
    model = Picky(refuses=True)
    setup = Setup(model=model, layers=lambda name, conv: True, example_input=torch.zeros(1, 3, 16, 16))
    seen = []
    for _ in range(3):
        setup.forward_and_step()
        model.seen.clear()
        setup.learner.after_step(setup.x, setup.y)
        seen.append(list(model.seen))
    assert seen == [[False, True], [True], [True]]


def test_an_error_has_no_context() -> None:
    """A chained error about a memory format that the caller did not choose would mislead."""
    model = Picky(refuses=True)
    with pytest.raises(RuntimeError, match="too many images") as caught:
        ahead(model, torch.randn(9, 3, 8, 8))
    assert caught.value.__context__ is None
    assert model.seen == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["channels-last-already", "float64"])
def test_nothing_runs_twice_in_the_same_memory_format(dtype: torch.dtype) -> None:
    model = Picky(refuses=False).to(dtype)
    layout = torch.channels_last if dtype == torch.float32 else torch.contiguous_format
    x = torch.randn(9, 3, 8, 8, dtype=dtype).contiguous(memory_format=layout)
    with pytest.raises(RuntimeError, match="too many images"):
        ahead(model, x)
    assert len(model.seen) == 1
