"""Anomaly detection: hold one class out of all training, then find it (Sec. 5.4, Tab. 4).

For each held-out class a backbone is pretrained and heads are fitted on the other classes, both
from nothing. Images are then scored by the unnormalised log-posterior (Eq. 20 at k = 0; see
`decision`), and AUPRC says how well low scores find the held-out class.

The split is that of Zenati et al., 2018, and their code, which Tab. 4's works follow: of the
whole data set, train and test parts together, a random 80 % of the normal images are for
training; the other 20 % and all images of the held-out class are for testing. Of MNIST, 33 to
39 % of the test images are then anomalies, and that is the AUPRC of a random score. Even the
worst has 0.19 to 0.23 (Boyd et al., 2012), so Tab. 4's row of the VAE, as low as 0.06, cannot be
of such a split. AUPRC is the average precision. Tab. 4's numbers are means over the last ten
epochs; here they are over the averaged heads at ten even points of the second half of the fit,
which does not stop early.

References: Zenati et al., 2018, https://arxiv.org/abs/1802.06222; Boyd et al., 2012,
"Unachievable region in precision-recall space", https://arxiv.org/abs/1206.4667
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ebm_prior import hub
from ebm_prior.backbone import Backbone
from ebm_prior.data import ImageSet, load_images
from ebm_prior.decision import Terms, compute_terms, draw_noise, draw_pixels, infer_upper
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import write_bytes, write_json
from ebm_prior.fit import FitConfig, fit
from ebm_prior.interrupt import Interrupted
from ebm_prior.outliers import metrics
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior
from ebm_prior.record import record
from ebm_prior.registry import find_trainer, load_backbone
from ebm_prior.run import RunFolder
from ebm_prior.saved import CONFIG
from ebm_prior.tables import Table

__all__ = [
    "AnomalyConfig",
    "Split",
    "check_digit",
    "hold_out",
    "load_whole",
    "run_digit",
    "start",
    "table",
]

SHARE = 0.8  # of the normal images, for training
POINTS = 10  # evaluations of the heads
SCORES = {
    "elbo": "backbone, ELBO",
    "log_posterior": "backbone, log-posterior",
    "energy_log_posterior": "energy prior, Eq. 20",
    "energy_elbo": "energy prior, ELBO",
}
"""Decision functions: name in results, and in tables."""


@dataclass(frozen=True)
class AnomalyConfig:
    """Settings of an experiment, the same for every held-out class.

    Attributes:
        data: Labelled data set, name or path.
        backbone: Family to pretrain.
        heads: `factorized`, `joint` or `both`.
        pretrain: Settings of the family's trainer.
        fit_iterations: Iterations of the heads' fit.
        number: Test images, at most, a random choice; 0 for all.
        seed: Seed of everything random.
    """

    data: str
    backbone: str = "hvae"
    heads: str = "joint"
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    fit_iterations: int = FitConfig.nce_iterations
    number: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fit_iterations < POINTS:
            raise EbmPriorError(
                f"the fit is judged at {POINTS} points, so it needs at least {POINTS} "
                f"iterations, got {self.fit_iterations}"
            )

    def fit_config(self) -> FitConfig:
        """Settings of the heads' fit: to the end, saved at twenty even points."""
        n = self.fit_iterations
        return FitConfig(
            nce_iterations=n,
            patience=n,
            save_every=max(n // (2 * POINTS), 1),
            sample_every=0,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Split:
    """Images of one held-out class and the others, uint8, (N, C, H, W).

    Attributes:
        train: Normal images for training.
        test: Normal images, then the held-out class.
        anomalous: Which test images are of that class, (N,) bool.
    """

    train: Tensor
    test: Tensor
    anomalous: Tensor


def load_whole(source: str) -> ImageSet:
    """All images of a data set with their labels, train and test parts together."""
    parts = [load_images(source, split=split, labels=True) for split in ("train", "test")]
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        raise EbmPriorError(f"{source}: its train and test images differ in size")
    images, labels = (torch.cat([getattr(p, n) for p in parts]) for n in ("images", "labels"))
    return ImageSet(images, labels, parts[0].name, "train and test")


def hold_out(whole: ImageSet, digit: int, seed: int, number: int = 0) -> Split:
    """Split a labelled set for one held-out class; see the module.

    Args:
        whole: All images.
        digit: Label of the held-out class.
        seed: Of the random choices.
        number: Test images, at most; 0 for all.

    Raises:
        EbmPriorError: If there is no such label, or no other.
    """
    generator = torch.Generator().manual_seed(seed)
    check_digit(whole, digit)
    held = whole.labels == digit
    normal = (~held).nonzero().flatten()
    normal = normal[torch.randperm(len(normal), generator=generator)]
    count = int(SHARE * len(normal))
    test = torch.cat([normal[count:], held.nonzero().flatten()])
    if number and number < len(test):
        kept = torch.randperm(len(test), generator=generator)[:number].sort().values
        test = test[kept]
    if held[test].all() or not held[test].any():
        raise EbmPriorError(f"{len(test)} test images hold only one kind; take more")
    return Split(whole.images[normal[:count]], whole.images[test], held[test])


def check_digit(whole: ImageSet, digit: int) -> None:
    """Raise `EbmPriorError` unless a labelled set has this label and others."""
    held = whole.labels == digit
    if held.all() or not held.any():
        known = ", ".join(map(str, sorted(set(whole.labels.tolist()))))
        raise EbmPriorError(
            f"cannot hold out {digit}: the labels of {whole.name} are {known}, and there must be "
            "others"
        )


def start(config: AnomalyConfig, out: Path) -> None:
    """Create the experiment's folder, or check that it was started with the same settings.

    Before any class has begun, there is nothing that other settings would spoil.

    Raises:
        EbmPriorError: If it was not, or it cannot be written.
    """
    settings, path = asdict(config), out / "settings.json"
    if not path.exists() or not any(out.glob("digit-*")):
        write_json(path, settings)
        return
    try:
        old = json.loads(path.read_text())
        changed = [key for key, value in settings.items() if old[key] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise EbmPriorError(f"{path} is damaged; choose another --out") from error
    if changed:
        raise EbmPriorError(
            f"{out} was started with another value of {', '.join(changed)}; go on with the same "
            "settings, or choose another --out"
        )


def run_digit(
    whole: ImageSet, digit: int, config: AnomalyConfig, out: Path, device: str = "cpu"
) -> dict:
    """Pretrain, fit and evaluate with one class held out; finished stages are kept.

    The folder holds `backbone/`, a run folder `heads/` (with `points/`, the heads at the points
    of evaluation) and `result.json`.

    Args:
        whole: All images.
        digit: Label of the held-out class.
        config: Settings.
        out: Folder of this class.
        device: Where to train.

    Returns:
        `digit`, `train_images`, `test_images`, `anomalies`, `seconds` of this process, and
        `auprc`: a list per decision function in `SCORES`, of one value or of ten.

    Raises:
        Interrupted: On Ctrl-C; calling again goes on.
    """
    result_path = out / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    began = time.monotonic()
    split = hold_out(whole, digit, config.seed, config.number)
    tqdm.write(
        f"held out {digit}: {len(split.train)} training images, {len(split.test)} test images, "
        f"{int(split.anomalous.sum())} of them anomalies -> {out}",
        file=sys.stderr,
    )
    try:
        backbone = pretrained(split.train, whole.name, config, out, device)
        prior = fitted(backbone, split.train, config, out / "heads")
    except Interrupted:
        raise Interrupted("interrupted; the same command goes on where it stopped") from None
    points = sorted((out / "heads" / "points").glob("*.safetensors"))
    terms, energies = evaluate_points(prior, [load_file(p) for p in points], split.test,
                                      config.seed)  # fmt: skip
    result = {
        "digit": digit,
        "train_images": len(split.train),
        "test_images": len(split.test),
        "anomalies": int(split.anomalous.sum()),
        "auprc": judge(terms, energies, split.anomalous),
        "seconds": round(time.monotonic() - began, 1),
    }
    record(out / "heads", "anomaly", result, [table([result])])  # for their report and card
    write_json(result_path, result)
    return result


def pretrained(
    images: Tensor, name: str, config: AnomalyConfig, out: Path, device: str
) -> Backbone:
    """The backbone of this class: loaded if it is finished, else trained on."""
    done, folder = out / "backbone.json", out / "backbone"
    if not done.exists():
        path = find_trainer(config.backbone)(
            images,
            out=folder,
            dataset=name,
            resume=folder.is_dir() and any(folder.iterdir()),
            seed=config.seed,
            device=device,
            **config.pretrain,
        )
        write_json(done, {"path": str(Path(path).relative_to(out))})
    path = out / json.loads(done.read_text())["path"]
    return load_backbone(config.backbone, path, device)


def fitted(backbone: Backbone, images: Tensor, config: AnomalyConfig, out: Path) -> EnergyPrior:
    """The heads of this class: loaded if they are finished, else fitted on."""
    status = None
    if (out / CONFIG).exists():
        status = RunFolder(out).config()["training"]["status"]
    if status == "finished":
        return EnergyPrior.from_pretrained(out, backbone=backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        prior = EnergyPrior.for_backbone(backbone, config.heads)
    settings = config.fit_config()
    first = settings.nce_iterations - POINTS * settings.save_every

    def keep(iteration: int) -> None:
        if iteration > first:
            path = out / "points" / f"{iteration:07d}.safetensors"
            write_bytes(path, hub.heads_bytes(prior))

    fit(prior, images, settings, run_dir=out, resume=status is not None, on_save=keep)
    return prior


@torch.no_grad()
def evaluate_points(
    prior: EnergyPrior,
    points: Sequence[Mapping[str, Tensor]],
    images: Tensor,
    seed: int,
    batch_size: int = 100,
) -> tuple[Terms, Tensor]:
    """Terms of the decision functions at one draw z ~ q(z|x), and the energies of many heads.

    The draws are those of `decision.score_images` at k = 0.

    Args:
        prior: Heads of the right shapes; they are replaced.
        points: Weights of the heads.
        images: uint8, (N, C, H, W).
        seed: Image i uses seed + i.
        batch_size: Images at a time.

    Returns:
        Terms (N,), whose `energy` is that of the last heads, and energies (len(points), N).
    """
    stream, found, energies = PosteriorStream(prior, images), [], []
    for first in tqdm(range(0, len(images), batch_size), "scoring", disable=None, delay=1):
        seeds = range(seed + first, seed + min(first + batch_size, len(images)))
        x = draw_pixels(stream, first, seeds)
        upper = infer_upper(prior.backbone, x, draw_noise(prior, seeds, 0), 0)
        inputs, values = prior.head_inputs(upper.z), []
        for weights in points:
            prior.heads.load_state_dict(weights)
            values.append(prior.energies_of(inputs).sum(1))
        found.append(compute_terms(prior, x, upper))
        energies.append(torch.stack(values))
    terms = Terms(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))
    return terms, torch.cat(energies, 1).double().cpu()


def judge(terms: Terms, energies: Tensor, anomalous: Tensor) -> dict[str, list[float]]:
    """AUPRC of every decision function, at every point where it depends on the heads."""
    plain = terms._replace(energy=torch.zeros_like(terms.energy))
    tilted = [terms._replace(energy=energy) for energy in energies]
    scores = {
        "elbo": [plain.elbo],
        "log_posterior": [plain.log_posterior],
        "energy_log_posterior": [t.log_posterior for t in tilted],
        "energy_elbo": [t.energy_elbo for t in tilted],
    }
    for name, values in scores.items():
        for value in values:
            if len(bad := (~value.isfinite()).nonzero().flatten()):
                raise EbmPriorError(
                    f"{SCORES[name]} is not finite for {len(bad)} of {len(value)} test images, "
                    f"the first is {bad[0]}: the training has diverged; lower its learning rate"
                )
    return {
        name: [metrics(-v[~anomalous], -v[anomalous])[1] for v in values]
        for name, values in scores.items()
    }


def table(results: Sequence[dict]) -> Table:
    """AUPRC, mean and standard deviation, with a column per held-out class (Tab. 4)."""
    rows = []
    for name, title in SCORES.items():
        cells = []
        for result in results:
            values = torch.tensor(result["auprc"][name]).double()
            spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        rows.append((title, *cells))
    chance = [f"{r['anomalies'] / r['test_images']:.3f}" for r in results]
    return Table(
        "AUPRC of a held-out class",
        ("held-out class", *(str(r["digit"]) for r in results)),
        [*rows, ("chance", *chance)],
        f"Mean and standard deviation over {POINTS} points of the heads' fit.",
    )
