import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as ebm_prior does, but before torch

import pytest
import torch

from backbones.toy import ToyBackbone


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def toy() -> ToyBackbone:
    return ToyBackbone().double().freeze()
