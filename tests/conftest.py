import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as ebm_prior does, but before torch

from tests.hub_server import Hub

# `huggingface_hub` reads its environment once, when first imported: no test may reach the
# network, the developer's token or their cache.
HUB = Hub()
HOME = tempfile.mkdtemp()
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": HOME, "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

from backbones.toy import ToyBackbone  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def toy() -> ToyBackbone:
    return ToyBackbone().double().freeze()


@pytest.fixture(scope="session")
def _serving():
    with HUB:
        yield HUB


@pytest.fixture
def hub(_serving, tmp_path, monkeypatch):
    """An empty Hub, an empty cache, a token that may write, and no waiting between retries."""
    from huggingface_hub import constants

    HUB.reset()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr("time.sleep", lambda _: None)
    return HUB
