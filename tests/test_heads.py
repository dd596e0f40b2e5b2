import pytest
import torch
from torch import nn

from ebm_prior.heads import EnergyHead

SHAPES = [
    (3, 1, 1),
    (3, 3, 3),
    (2, 4, 4),
    (5, 7, 7),
    (2, 8, 8),
    (2, 14, 14),
    (20, 16, 16),
    (4, 28, 28),
    (3, 5, 9),
    (1,),
    (100,),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_gives_one_energy_and_every_parameter_a_gradient(shape):
    head = EnergyHead(shape, nef=4, ndf=6)
    out = head(torch.randn(5, *shape))
    assert out.shape == (5,)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("size, convolutions", [(8, 1), (16, 2), (32, 3), (64, 4), (128, 5)])
def test_layers_are_those_of_table_12(size, convolutions):
    head = EnergyHead((20, size, size), nef=64, ndf=200)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(convs) == convolutions
    assert all(
        c.kernel_size == (4, 4) and c.stride == (2, 2) and c.out_channels == 64 for c in convs
    )
    assert [m.out_features for m in linears] == [200] * convolutions + [1]
    assert linears[0].in_features == 4 * 4 * 64


def test_an_untrained_head_barely_tilts():
    assert EnergyHead((8, 8, 8))(torch.randn(50, 8, 8, 8)).abs().max() < 0.2


def test_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="shape"):
        EnergyHead((3, 4))
