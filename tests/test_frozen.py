"""Backward passes written by hand: exact, half the memory, and only where weights are frozen."""

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_against_finite_differences(case, layout):
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


def test_half_is_kept():
    module = swish_conv(5, 6, False)
    flat = torch.randn(2, 6 * 8 * 8).double()

    def kept(call):
        return saved_bytes(lambda x: call(2 * x), flat, lambda x: x.view(2, 6, 8, 8))

    one = 8 * flat.numel()
    assert kept(module) == one
    assert kept(lambda x: plain(module, x)) == 2 * one


@pytest.mark.parametrize("change", ["none", "little to do", "double", "a weight that trains"])
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
    x.requires_grad_()
    y = module(x)
    assert y.is_contiguous(memory_format=layout)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert len(calls) == (2 if change == "none" else 0)
    assert found.is_contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(plain(module, x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_prepared_weights_follow_their_origin():
    module = swish_conv(5, 6, False).float()
    x = torch.randn(2, 6, 4, 4, requires_grad=True)

    def gradient(call):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(call(x).float().sum(), x)[0]

    before = gradient(module)
    with torch.no_grad():
        module.weight.mul_(2)
    torch.testing.assert_close(gradient(module), 2 * before)
    module.load_state_dict({name: tensor / 2 for name, tensor in module.state_dict().items()})
    torch.testing.assert_close(gradient(module), before)
    module.double().float().weight.data.mul_(2)  # new tensors, whose versions start again
    torch.testing.assert_close(gradient(module), 2 * before)
