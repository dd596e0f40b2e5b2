import pytest
import torch

from backbones.toy import ToyBackbone


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def toy() -> ToyBackbone:
    return ToyBackbone().double().freeze()
