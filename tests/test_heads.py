import pytest
import torch
from torch import nn

from ebm_prior import EbmPriorError
from ebm_prior.heads import EnergyHead, check_layers, make_heads, widths_of

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


def linear_sizes(head):
    return [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]


def test_linear_layers_may_be_listed_head_by_head():
    """Table 12's heads on z_2 and z_1; the convolutions of a spatial head stay as they are."""
    top, bottom = make_heads([(100,), (100,)], 64, 200, ((100, 100), (200,) * 4))
    assert linear_sizes(top) == [(100, 100), (100, 100), (100, 1)]
    assert linear_sizes(bottom) == [(100, 200), *[(200, 200)] * 3, (200, 1)]
    (spatial,) = make_heads([(2, 16, 16)], 5, 200, [[7, 3, 4]])
    assert linear_sizes(spatial) == [(80, 7), (7, 3), (3, 4), (4, 1)]
    assert sum(isinstance(m, nn.Conv2d) for m in spatial.modules()) == 2
    assert spatial(torch.randn(3, 2, 16, 16)).shape == (3,)


def test_the_listed_default_is_the_default():
    draws = []
    for layers in (None, [(6, 6)]):
        torch.manual_seed(0)
        draws.append(make_heads([(3,)], 4, 6, layers).state_dict())
    assert draws[0].keys() == draws[1].keys()
    assert all(torch.equal(draws[0][k], draws[1][k]) for k in draws[0])


@pytest.mark.parametrize(
    "layers",
    [5, "100", [], [[4]], [[4], [4], [4]], [[4], 4], [[4], []], [[4], [0]], [[4], [True]],
     [[4], [4.0]], [[4], [4] * 17], [[4], [1 << 17]], {"z2": [4], "z1": [4]}, [[4], ["4"]]],
    ids=str,
)  # fmt: skip
def test_lists_that_do_not_fit_the_heads_are_one_line(layers):
    with pytest.raises(EbmPriorError, match=r"for each of 2 heads \('z2', 'z1'\)") as caught:
        check_layers(layers, ["z2", "z1"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_widths_are_said_in_words():
    heads = {"kind": "factorized", "nef": 4, "ndf": 6}
    assert widths_of(heads) == "nef 4, ndf 6"
    listed = heads | {"layers": [[5, 6], [7]]}
    assert widths_of(listed) == "nef 4, linear layers 5-6, 7"


def test_an_untrained_head_barely_tilts():
    assert EnergyHead((8, 8, 8))(torch.randn(50, 8, 8, 8)).abs().max() < 0.2


def test_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="shape"):
        EnergyHead((3, 4))
