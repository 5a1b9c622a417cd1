"""Channel flow against the network itself: constant, zero, read and dead are what they are when it runs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.graph.network import TracedNetwork, trace
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.structure import GroupStructure
from dsp_pruning.flow.channels import channel_flow


class Everything(nn.Module):
    """Every kind of node that carries channels, with a residual stream and an opaque product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn_stem = nn.BatchNorm2d(6)
        self.conv_a = nn.Conv2d(6, 8, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(8)
        self.conv_b = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(6)
        self.unpadded = nn.Conv2d(6, 6, 3)  # no padding: constants stay constant
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.packed = PackedConv2d(GroupStructure.build(4, 5, [((0, 3), (4, 1)), ((2,), (0,))]), 1, bias=True)
        self.gate = nn.Conv2d(5, 5, 1)
        self.norm = nn.BatchNorm2d(5, affine=False)
        self.fc = nn.Linear(5 * 4, 7)
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.bn_stem(self.stem(x))), 3, 2, 1)
        y = F.relu(self.bn_a(self.conv_a(x)))
        x = F.hardswish(x + self.bn_b(self.conv_b(y)))
        x = F.avg_pool2d(self.unpadded(x), 2, 2, 1)
        x = self.packed(self.grouped(F.silu(self.depthwise(x))))
        x = x * torch.sigmoid(self.gate(x))
        x = F.silu(self.norm(x))
        return self.fc(F.max_pool2d(x, 2).flatten(1)) + self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def randomised(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Random parameters in eval mode; masks without some filters, channels and single kernels."""
    torch.manual_seed(seed)
    model = Everything().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                module.weight.data[torch.rand(len(module.weight)) < 0.2] = 0
    nn.init.normal_(model.packed.bias)
    model.fc.weight.data[:, :7] = 0  # channel 0, and all but one feature of channel 1
    model.head.weight.data[:, 0] = 0
    model.grouped.weight.data[3] = 0
    masks = {}
    for name in ("conv_a", "conv_b", "unpadded"):
        o, c = model.get_submodule(name).weight.shape[:2]
        mask = (torch.rand(o, c) < 0.8) & (torch.rand(o, 1) < 0.6) & (torch.rand(1, c) < 0.7)
        masks[name] = mask
        model.get_submodule(name).weight.data.mul_(mask[:, :, None, None])
    return model, masks


class Run(fx.Interpreter):
    """Runs the graph, keeps every tensor, and adds noise to one channel of one of them."""

    def __init__(self, network: TracedNetwork, node: str = "", channel: int = 0) -> None:
        super().__init__(network.graph_module)
        self.values: dict[str, Tensor] = {}
        self.node, self.channel = node, channel

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name == self.node:
            value = value.clone()
            value[:, self.channel] += 20 * torch.randn_like(value[:, self.channel])
        if isinstance(value, Tensor):
            self.values[n.name] = value
        return value


@torch.no_grad()
def outputs(network: TracedNetwork, x: Tensor, node: str = "", channel: int = 0) -> Tensor:
    return Run(network, node, channel).run(x)


AFTER_OPAQUE = ("gate", "norm")  # what a product makes of constants is not known
SEEDS = range(6)  # every rule is met by one of them: both signs of constants, all-dead and all-live layers


@pytest.mark.parametrize("seed", SEEDS)
def test_constants_are_what_the_network_computes(seed: int) -> None:
    model, _ = randomised(seed)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64) * 3
    network = trace(model, x)
    flow = channel_flow(network)
    run = Run(network)
    with torch.no_grad():
        run.run(x)
    met = 0
    for name, state in flow.states.items():
        value = run.values[name].transpose(0, 1).flatten(1)
        constant = state.constant[:, None].expand_as(value)
        known = ~state.constant.isnan()
        assert torch.allclose(value[known], constant[known], rtol=0, atol=1e-12), name
        assert bool((value[state.zero] == 0).all()), name
        if network[name].kind in ("conv", "batch_norm") and name not in AFTER_OPAQUE:
            assert bool((value[~known].std(1) > 0).all()), f"{name} calls a constant channel varying"
        met += int(known.sum())
    assert met > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_channel_is_read_exactly_if_the_output_follows_it(seed: int) -> None:
    model, _ = randomised(seed)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64) * 3
    network = trace(model, x)
    flow = channel_flow(network)
    plain = outputs(network, x)
    unread = 0
    for name, state in flow.states.items():
        for channel in range(len(state.read)):
            if network[name].kind == "linear":
                continue
            moved = not torch.equal(outputs(network, x, name, channel), plain)
            if not state.read[channel] and state.constant[channel].isnan():
                assert not moved, f"{name}[{channel}] is called unread"
                unread += 1
            elif state.live[channel] and network[name].kind in ("add", "max_pool", "activation", "flatten"):
                assert moved, f"{name}[{channel}] is called read"
    assert unread > 0


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_dead_kernels_can_be_zeroed(seed: int) -> None:
    model, masks = randomised(seed)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    network = trace(model, x)
    flow = channel_flow(network)
    before = model(x)
    removed = 0
    for name in ("stem", "conv_a", "conv_b", "unpadded", "gate"):
        weight = model.get_submodule(name).weight
        alive = flow.kernels[name][:, :, None, None]
        removed += int(((weight != 0).flatten(2).any(2) & ~alive[:, :, 0, 0]).sum())
        weight.mul_(alive)
    assert removed > 0
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    assert masks  # the same masks, passed by hand, on weights that were never multiplied
    unmasked, _ = randomised(seed)
    for name, mask in masks.items():
        weight = unmasked.get_submodule(name).weight
        weight.masked_fill_(~mask[:, :, None, None], 1.0)
    by_hand = channel_flow(trace(unmasked, x), masks)
    for name, state in flow.states.items():
        assert torch.equal(by_hand[name].read, state.read), name
        assert torch.equal(by_hand[name].zero, state.zero), name


def chain(*layers: nn.Module) -> tuple[nn.Module, TracedNetwork]:
    model = nn.Sequential(*layers)
    return model, trace(model, torch.zeros(1, 2, 6, 6))


def test_batch_norm_turns_a_dead_filter_into_its_eval_constant() -> None:
    model, network = chain(
        nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)
    )
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean.copy_(torch.tensor([2.0, -2.0, 0.0]))
        model[1].running_var.fill_(4.0)
        model[1].bias.copy_(torch.tensor([0.5, 0.5, -1.0]))
    flow = channel_flow(network)
    assert torch.allclose(flow["_1"].constant, torch.tensor([-0.5, 1.5, -1.0]).double(), atol=1e-5)
    # Only the positive one outlives the ReLU; its readers stay alive, and at the border their sum varies.
    assert flow["_2"].zero.tolist() == [True, False, True]
    assert flow.kernels["_3"].tolist() == [[False, True, False]] * 2
    assert flow["_3"].constant.isnan().all()
    assert flow["_0"].read.tolist() == [False, True, False]
    assert not flow.connected
    _, network = chain(*model[:3], nn.Softplus())  # an opaque reader of every channel
    assert channel_flow(network)["_2"].read.all()
    assert channel_flow(network)["_1"].read.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("padding", "mode", "constant"),
    [(0, "zeros", True), ("valid", "zeros", True), (1, "reflect", True), (1, "zeros", False)],
)
@torch.no_grad()
def test_a_constant_survives_a_conv_that_pads_no_zeros(padding: Any, mode: str, constant: bool) -> None:
    reader = nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode)
    model, network = chain(nn.Conv2d(2, 2, 1), reader)
    model[0].weight.zero_()
    flow = channel_flow(network)
    assert torch.equal(flow["_0"].constant, model[0].bias.double())
    assert (~flow["_1"].constant.isnan()).tolist() == [constant] * 3
    if constant:
        found = model(torch.randn(2, 2, 6, 6)).transpose(0, 1).flatten(1)
        assert torch.allclose(found, flow["_1"].constant.float()[:, None].expand_as(found), atol=1e-6)
    assert flow.kernels["_1"].all()  # their share of the output is not folded into anything


def test_pruning_semantics_trust_masks_only() -> None:
    model, network = chain(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2)
    )
    with torch.no_grad():
        model[1].bias.fill_(1.0)  # cleared with its filter, so it feeds nothing
        model[3].weight[0].zero_()  # may still learn
        model[4].weight.zero_()  # may still learn
    flow = channel_flow(network, {"0": torch.tensor([[1, 1], [0, 0], [0, 1]])[:, :, None, None]}, "pruning")
    assert flow["_2"].zero.tolist() == [False, True, False]
    assert flow.kernels["_3"].tolist() == [[True, False, True]] * 2
    assert flow.kernels["_0"].tolist() == [[True, True], [False, False], [False, True]]
    assert flow.connected
    assert channel_flow(network).kernels["_0"].any().item() is False  # eval: the last BN lets nothing through


def test_pruning_leaves_the_bias_of_a_layer_it_does_not_own() -> None:
    _, network = chain(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, bias=False))
    flow = channel_flow(network, {"0": torch.zeros(2, 2)}, "pruning")
    assert flow["_0"].zero.all()
    assert not flow["_1"].zero.any()
    owned = channel_flow(network, {"0": torch.zeros(2, 2), "1": torch.ones(2, 2)}, "pruning")
    assert owned["_1"].zero.all()
    assert owned["_2"].zero.all()


def test_pruning_follows_a_dead_filter_through_the_whole_chain() -> None:
    _, network = chain(*[nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(4)])
    first = torch.eye(2, dtype=torch.bool)
    flow = channel_flow(network, {"0": first, "1": first, "2": first, "3": first & first[0]}, "pruning")
    for node in ("_0", "_1", "_2", "_3"):
        assert flow.kernels[node].tolist() == [[True, False], [False, False]], node
    cut = channel_flow(network, {"1": first, "2": ~first & first[1]}, "pruning")
    assert cut.connected
    assert not channel_flow(network, {"1": first & first[0], "2": first & first[1]}, "pruning").connected


class Twice(nn.Module):
    """One conv and one BN that run twice; the second time nothing feeds channel 1 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 1)
        self.again = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.again(x)) + self.norm(self.again(self.first(x)))


def test_a_module_that_runs_twice_is_not_cleared_for_one_of_its_runs() -> None:
    network = trace(Twice(), torch.zeros(1, 2, 4, 4))
    masks = {"first": torch.tensor([[1, 1], [0, 0]]), "again": torch.eye(2)}
    flow = channel_flow(network, masks, "pruning")
    assert flow["first"].zero.tolist() == [False, True]
    # `again` reads only the dead channel here, but its bias is needed by its first run.
    assert flow["again_1"].zero.tolist() == [False, False]
    assert flow["norm_1"].zero.tolist() == [False, False]
    gone = channel_flow(network, {"again": torch.tensor([[1, 1], [0, 0]])}, "pruning")
    assert gone["again_1"].zero.tolist() == [False, True]
    assert gone["norm_1"].zero.tolist() == [False, False]


def test_a_linear_layer_along_another_axis_reads_every_channel() -> None:
    _, network = chain(nn.Conv2d(2, 3, 1), nn.Linear(6, 5), nn.Conv2d(3, 1, 1))
    flow = channel_flow(network)
    assert flow["_0"].read.all()
    assert "_1" not in flow.kernels


def test_a_mask_of_another_shape_is_an_error_that_names_the_layer() -> None:
    _, network = chain(nn.Conv2d(2, 3, 1))
    with pytest.raises(DSPShapeError, match=r"layer '0'.*\(2, 3\).*expected \(3, 2\)"):
        channel_flow(network, {"0": torch.ones(2, 3)})
