import math

import numpy as np
import pytest
import torch

from ebm_prior import EbmPriorError, langevin
from ebm_prior.diagnostics import directions, mixing
from ebm_prior.langevin import flatten
from tests.test_langevin import KAPPA, log_density, start


def ar1(a, draws, chains, seed=0):
    """Stationary x_t = a x_{t-1} + sqrt(1 - a^2) n_t, (draws, chains)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((draws, chains))
    for t in range(1, draws):
        x[t] = a * x[t - 1] + math.sqrt(1 - a * a) * x[t]
    return x


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, -0.4])
def test_ess_of_an_ar1_process_is_that_in_closed_form(a):
    """ESS = N (1 - a) / (1 + a)."""
    x = ar1(a, 2000, 32)
    found = mixing({"x": x})["x"]
    assert found.ess == pytest.approx(x.size * (1 - a) / (1 + a), rel=0.2)
    assert found.rhat == pytest.approx(1, abs=0.02)


def test_ess_of_langevin_on_a_gaussian_is_that_of_its_ar1_process():
    step_size, rows = 0.1, []
    a = 1 - step_size * (1 + KAPPA) / 2
    eps, g = start(32)
    langevin(log_density, eps, steps=2000, step_size=step_size, generator=g,
             callback=lambda info: rows.append(flatten(info.eps)[0][:, 0].numpy()))  # fmt: skip
    x = np.stack(rows)[50:]
    assert mixing({"x": x})["x"].ess == pytest.approx(x.size * (1 - a) / (1 + a), rel=0.15)


def test_rhat_tells_chains_that_disagree_or_drift():
    x = ar1(0.5, 500, 8)
    apart, drifting = x + 3 * np.arange(8), x + np.linspace(0, 6, 500)[:, None]
    found = mixing({"well": x, "apart": apart, "drifting": drifting})
    assert found["well"].rhat < 1.02 < 1.5 < found["apart"].rhat
    assert found["drifting"].rhat > 1.3 and found["drifting"].ess < 0.02 * x.size


def test_chains_that_stand_still_are_no_error(recwarn):
    found = mixing({"x": np.ones((20, 4)), "y": np.ones((20, 1)) * np.arange(4)})
    assert math.isnan(found["x"].rhat) and found["y"].ess < 10
    assert math.isnan(found["x"].ess)  # and not as many as there are draws
    assert not recwarn.list


def test_directions_are_fixed_unit_vectors():
    u = directions(500, 3)
    assert torch.equal(u, directions(500, 3)) and u.shape == (500, 3)
    torch.testing.assert_close(u.norm(dim=0), torch.ones(3).double())
    assert (u.T @ u - torch.eye(3).double()).abs().max() < 0.2


def test_too_few_draws_are_refused():
    with pytest.raises(EbmPriorError, match="at least 8 draws"):
        mixing({"x": np.zeros((7, 4))})
