import gc
import threading
import time
import weakref

import pytest
import torch

from ebm_prior import EbmPriorError, FitConfig, fit
from ebm_prior.fit import _Fit
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prefetch import Prefetch
from tests.test_fit import mismatched_images, new_prior, weights
from tests.test_micro_batch import ERRORS

CPU = torch.device("cpu")
STREAMED = dict(
    objective="nce+mle",
    nce_iterations=12,
    mle_iterations=8,
    batch_size=16,
    save_every=5,
    chains="fresh",
    sample_every=0,
    draws=1,
    cache_gb=0.0,
)


def running():
    """Threads of ours that have not ended."""
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def counting(made):
    """A `make` that notes what it makes."""

    def make(number):
        made.append(number)
        return (torch.tensor([number]),)

    return make


def test_every_batch_is_made_once_and_none_beyond_the_last():
    made = []
    with Prefetch(counting(made), 5, CPU) as prefetched:
        assert [prefetched(i)[0].item() for i in range(5)] == list(range(5))
    assert made == list(range(5)) and not running()


def test_a_jump_back_gets_what_it_asks_for():
    made = []
    with Prefetch(counting(made), 9, CPU) as prefetched:
        assert [prefetched(i)[0].item() for i in (0, 1, 2, 0, 1, 7)] == [0, 1, 2, 0, 1, 7]
    assert set(made) <= {0, 1, 2, 3, 7, 8}


def test_the_next_batch_is_made_while_this_one_is_used():
    begun = threading.Event()

    def make(number):
        if number:
            begun.set()
        return (torch.tensor([number]),)

    with Prefetch(make, 2, CPU) as prefetched:
        prefetched(0)
        assert begun.wait(30)


def test_mps_is_left_to_one_thread():
    made = []
    with Prefetch(counting(made), 5, torch.device("mps")) as prefetched:
        for i in range(3):
            prefetched(i)
            time.sleep(0.01)
            assert made == list(range(i + 1))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_batch_without_memory_beside_the_chains_is_made_again_alone(error):
    failures = [error]

    def make(number):
        if number == 1 and failures:
            raise failures.pop()
        return (torch.tensor([number]),)

    with Prefetch(make, 3, CPU) as prefetched:
        assert [prefetched(i)[0].item() for i in range(3)] == [0, 1, 2]
    failures.extend([error] * 2)
    with Prefetch(make, 3, CPU) as prefetched, pytest.raises(type(error)) as raised:
        prefetched(0), prefetched(1)
    assert raised.value is error
    assert not running()


def test_a_batch_is_made_again_once_the_first_attempt_has_let_go_of_its_memory():
    attempts, alive = [], []

    def make(number):
        large = torch.zeros(1000)
        if number == 1:
            alive.append(sum(ref() is not None for ref in attempts))
            attempts.append(weakref.ref(large))
            if len(attempts) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return (large,)

    gc.disable()  # which may come too late
    try:
        with Prefetch(make, 3, CPU) as prefetched:
            for number in range(2):
                prefetched(number)
    finally:
        gc.enable()
    assert alive == [0, 0]


@pytest.mark.gpu
def test_on_cuda_batches_are_whole_when_they_are_used():
    device = torch.device("cuda")
    base = torch.randn(2000, 2000, device=device)

    def make(number):
        x = base + number
        for _ in range(20):
            x = (x @ base).tanh()
        return (x,)

    want = [make(i)[0].sum().item() for i in range(6)]
    with Prefetch(make, 6, device) as prefetched:
        for i in range(6):
            (x,) = prefetched(i)
            kept = x.sum()
            del x  # its memory must not serve the next batch before the sum is done
            assert kept.item() == want[i]


def test_a_fit_encodes_the_next_batch_while_the_chains_of_this_one_run(toy, tmp_path, monkeypatch):
    n = STREAMED["mle_iterations"]
    meeting = threading.Barrier(2, timeout=60)  # of the chains and the next batch's encoder
    encoded, moved = [], []
    call, transitions = PosteriorStream.__call__, _Fit.transitions

    def encode(self, *args):
        encoded.append(threading.current_thread())
        if len(encoded) > 1:
            meeting.wait()
        return call(self, *args)

    def move(self, *args):
        moved.append(threading.current_thread())
        if len(moved) < n:
            meeting.wait()
        return transitions(self, *args)

    monkeypatch.setattr(PosteriorStream, "__call__", encode)
    monkeypatch.setattr(_Fit, "transitions", move)
    config = FitConfig(**STREAMED | dict(objective="mle"))
    fit(new_prior(toy), mismatched_images(toy, 60), config, run_dir=tmp_path / "run")
    assert len(encoded) == len(moved) == n
    assert set(moved) == {threading.main_thread()} and set(encoded).isdisjoint(moved)
    assert not running()


def test_a_fit_does_not_depend_on_when_batches_are_made(toy, tmp_path, monkeypatch):
    images, config = mismatched_images(toy, 60), FitConfig(**STREAMED)
    ahead, inline = new_prior(toy), new_prior(toy)
    fit(ahead, images, config, run_dir=tmp_path / "ahead")
    monkeypatch.setattr(Prefetch, "__call__", lambda self, number: self.make(number))
    picked, call = [], PosteriorStream.__call__

    def record(self, index, generator):
        z = call(self, index, generator)
        picked.append((tuple(index.tolist()), z[0].sum().item()))
        return z

    monkeypatch.setattr(PosteriorStream, "__call__", record)
    fit(inline, images, config, run_dir=tmp_path / "inline")
    assert torch.equal(weights(ahead), weights(inline))
    assert len(picked) == 1 + 12 + 8  # the held-out batch, then one per iteration
    assert len({rows for rows, _ in picked}) == len({z for _, z in picked}) == len(picked)


@pytest.mark.parametrize("error", [EbmPriorError, KeyboardInterrupt])
def test_whatever_ends_a_fit_ends_its_thread(toy, tmp_path, monkeypatch, error):
    """An error of the thread, and one of the caller while the thread is at work."""
    images, config = mismatched_images(toy, 60), FitConfig(**STREAMED | dict(objective="mle"))
    call = PosteriorStream.__call__

    def encode(self, *args):
        time.sleep(0.02)
        if error is EbmPriorError and threading.current_thread() in running():
            raise EbmPriorError("the disk has gone")
        return call(self, *args)

    def update(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(PosteriorStream, "__call__", encode)
    monkeypatch.setattr(_Fit, "update", update)
    with pytest.raises(error):
        fit(new_prior(toy), images, config, run_dir=tmp_path / "run")
    assert not running()
