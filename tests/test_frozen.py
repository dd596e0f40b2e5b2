"""Backward passes written by hand: exact, half the memory, and only where weights are frozen."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from backbones.nvae import frozen
from backbones.nvae.frozen import FrozenConv2d, gated_sum
from ebm_prior.memory import saved_bytes


def swish_conv(kernel, groups, doubled, c_in=6, c_out=6, swish=True):
    torch.manual_seed(0)
    conv = FrozenConv2d(c_in, c_out, kernel, groups=groups)
    conv.swish, conv.doubled = swish, doubled
    return conv.requires_grad_(False).double()


def gate(channels=6):
    torch.manual_seed(0)
    layers = nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid()
    return nn.Sequential(*layers).requires_grad_(False).double()


def plain(module, *inputs):
    """The same without a backward pass of its own: a weight trains."""
    module.requires_grad_(True)
    out = module(*inputs)
    module.requires_grad_(False)
    return out


class Gated(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, skip, y):
        return gated_sum(skip, y, self.layers, 0.1)


CASES = {
    "depthwise": (swish_conv(5, 6, False), 1),
    "depthwise after doubling": (swish_conv(3, 6, True), 1),
    "grouped": (swish_conv(3, 2, False, 6, 4), 1),
    "dense": (swish_conv(3, 1, False, 6, 3), 1),
    "pointwise": (swish_conv(1, 1, False, 6, 2), 1),
    "pointwise after doubling": (swish_conv(1, 1, True), 1),
    "without swish": (swish_conv(1, 1, False, 6, 2, swish=False), 1),
    "gate": (Gated(gate()), 2),
}


@pytest.fixture(params=CASES)
def case(request):
    module, count = CASES[request.param]
    torch.manual_seed(1)
    return module, [torch.randn(2, 6, 4, 4).double().requires_grad_() for _ in range(count)]


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_finite_differences(case, layout, on_cpu, monkeypatch):
    monkeypatch.setattr(frozen, "on_cpu", lambda _: on_cpu)  # what other devices run
    module, inputs = case
    inputs = [x.detach().to(memory_format=layout).requires_grad_() for x in inputs]
    assert module(*inputs).grad_fn.name().startswith("_")  # one of ours
    assert torch.autograd.gradcheck(module, inputs)


def test_against_plain_operations(case):
    module, inputs = case
    torch.testing.assert_close(module(*inputs), plain(module, *inputs))
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), plain(module, *inputs))


def test_weights_that_train_have_gradients(case):
    """All of them, or any one alone."""
    module, inputs = case
    every = list(module.parameters())
    for trained in (every, *([weight] for weight in every)):
        for weight in trained:
            weight.requires_grad_(True)
        grads = torch.autograd.grad(module(*inputs).square().sum(), trained)
        module.requires_grad_(False)
        assert all(grad.any() for grad in grads)


def test_an_empty_batch(case):
    module, inputs = case
    inputs = [x[:0].detach().requires_grad_() for x in inputs]
    for grad, x in zip(torch.autograd.grad(module(*inputs).sum(), inputs), inputs, strict=True):
        assert grad.shape == x.shape


def test_differentiated_twice(case):
    module, inputs = case
    assert torch.autograd.gradgradcheck(module, inputs)
    if not getattr(module, "swish", True):
        return  # linear: its gradient depends on nothing
    # also where the gradient that comes in depends on nothing
    (grad,) = torch.autograd.grad(module(*inputs).sum(), inputs[-1], create_graph=True)
    expected = torch.autograd.grad(plain(module, *inputs).sum(), inputs[-1], create_graph=True)[0]
    torch.testing.assert_close(
        *(torch.autograd.grad(first.square().sum(), inputs[-1]) for first in (grad, expected))
    )


def test_transformed_by_torch_func(case):
    module, inputs = case
    (want,) = torch.autograd.grad(module(*inputs).square().sum(), inputs[-1:])
    others = [x.detach() for x in inputs[:-1]]
    points = inputs[-1].detach()

    def energy(x):
        return module(*others, x).square().sum()

    torch.testing.assert_close(torch.func.grad(energy)(points), want)

    def of_one(x, *rest):
        return module(*(y[None] for y in rest), x[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(of_one))(points, *others)
    torch.testing.assert_close(found, want)


def test_in_bfloat16(case):
    """Types follow the inputs, as with autograd, and values agree."""
    module, inputs = case
    module.float()
    found = []
    for call in (module, lambda *x: plain(module, *x)):
        points = [x.detach().float().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*points)
        loss = out.float().square().sum()
        grads = torch.autograd.grad(loss, points, retain_graph=True)
        again = torch.autograd.grad(loss, points, create_graph=True)
        twice = torch.autograd.grad(sum(grad.square().sum() for grad in again), points)
        found.append((out, *grads, *again, *twice))
    module.double()
    for ours, autograds in zip(*found, strict=True):
        assert ours.dtype == autograds.dtype
        assert (ours - autograds).norm() < 1e-2 * autograds.norm()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch's own
def test_batched_and_forward_gradients(case, monkeypatch):
    """Of `is_grads_batched` and `forward_ad`, which no custom function is told of."""
    monkeypatch.setattr(frozen, "WORTH", 0)
    module, inputs = case
    module.float()
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    out = module(*inputs)
    weights = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, inputs, weights, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, inputs, each, retain_graph=True) for each in weights]
    torch.testing.assert_close(
        found, tuple(torch.stack(part) for part in zip(*alone, strict=True))
    )
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.detach(), t) for x, t in zip(inputs, tangents, strict=True)
        ]
        moved = forward_ad.unpack_dual(module(*duals)).tangent
    module.double()
    products = [(x * t).sum((1, 2, 3)) for x, t in zip(alone[0], tangents, strict=True)]
    torch.testing.assert_close((moved * weights[0]).sum((1, 2, 3)), sum(products))


def test_half_is_kept():
    module = swish_conv(5, 6, False)
    flat = torch.randn(2, 6 * 8 * 8).double()

    def kept(call):
        return saved_bytes(lambda x: call(2 * x), flat, lambda x: x.view(2, 6, 8, 8))

    one = 8 * flat.numel()
    assert kept(module) == one
    assert kept(lambda x: plain(module, x)) == 2 * one
    module.swish = False
    assert kept(module) == 0


def test_a_gradient_takes_the_layout_of_what_came_out():
    module = swish_conv(1, 1, False).float()
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    (grad,) = torch.autograd.grad(y, x, torch.randn(y.shape))
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:TF32")  # of torch's own switch
@pytest.mark.parametrize(
    "change", ["none", "little to do", "double", "a weight that trains", "no oneDNN", "disabled"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel, groups", [(1, 1), (5, 6)])
def test_onednn_is_called_directly_where_it_pays(monkeypatch, change, layout, kernel, groups):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    module = swish_conv(kernel, groups, False).float()
    monkeypatch.setattr(frozen, "WORTH", 10**9 if change == "little to do" else 0)
    calls, convolve = [], torch.mkldnn_convolution
    spy = lambda *args: calls.append(args) or convolve(*args)  # noqa: E731
    monkeypatch.setattr(torch, "mkldnn_convolution", spy)
    x = torch.randn(3, 6, 4, 4).to(memory_format=layout)
    if change == "double":
        module, x = module.double(), x.double()
    module.requires_grad_(change == "a weight that trains")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: change != "no oneDNN")
    x.requires_grad_()
    off = torch.backends.mkldnn.flags(enabled=False)
    with off if change == "disabled" else nullcontext():
        (found,) = torch.autograd.grad(module(x).square().sum(), x)
    assert len(calls) == (2 if change == "none" else 0)
    assert found.is_contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(plain(module, x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-6), (True, 1e-2)])
def test_what_is_kept_follows_the_weights(bf16, tolerance):
    module = swish_conv(5, 6, False).float()
    x = torch.randn(2, 6, 4, 4, requires_grad=True)

    def both(call):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = call(x)
        return y, torch.autograd.grad(y.float().square().sum(), x)[0]

    def check():
        for _ in range(2):  # made, and found again
            want = both(lambda x: plain(module, x))
            for found, expected in zip(both(module), want, strict=True):
                assert (found - expected).norm() < tolerance * expected.norm()

    check()
    with torch.no_grad():
        module.weight.mul_(2)
    check()
    with torch.no_grad():
        module.bias.add_(1)
    check()
    module.load_state_dict({name: 3 * tensor for name, tensor in module.state_dict().items()})
    check()
    state = {name: tensor / 2 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    check()
    module.weight.data = module.weight.data.flip(0)
    check()
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.mul_(2)
    check()
    module.double().float()
    check()


def test_types_do_not_mix():
    module = swish_conv(5, 6, False).float()
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    before = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert module.double()(x.double()).dtype == torch.float64
    assert torch.equal(module.float()(x), before)
    with pytest.raises(RuntimeError, match="scalar type|same"):
        module(x.double())


def test_a_weight_changed_before_the_backward_pass_is_an_error():
    module = swish_conv(5, 6, False)
    y = module(torch.randn(2, 6, 4, 4).double().requires_grad_()).sum()
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode_leaves_nothing_that_autograd_cannot_use():
    module = swish_conv(5, 6, False).float()
    x = torch.randn(2, 6, 4, 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(module)(x)
        module(x)
    point = x.clone().requires_grad_()
    y = module(point).sum()
    with torch.inference_mode():
        torch.autograd.grad(y, point)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(point).float().square().sum()
    y = y + module(point).square().sum()
    (grad,) = torch.autograd.grad(y, point, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), point)[0].any()
