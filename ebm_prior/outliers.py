"""Outlier detection: two sets of images, and how well each score tells them apart (Tab. 11).

Outliers are the positive class. A score is high for them: -L^{>k}, or LLR^{>k}; see
`decision`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ebm_prior.decision import METHODS, default_k, score_images
from ebm_prior.errors import EbmPriorError
from ebm_prior.plots import ENERGY, GAUSSIAN, new_figure, png
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Detection", "Outliers", "detect_outliers", "metrics"]

BINS = 40


@dataclass(frozen=True)
class Detection:
    """How well one score tells outliers, which count as positive, from the others.

    Attributes:
        k: Groups taken from the prior.
        ratio: Whether the score is LLR^{>k}, instead of -L^{>k}.
        method: Key of `METHODS`.
        auroc: Area under the ROC curve, or None where a score is not finite.
        auprc: Average precision, or None.
        fpr80: Share of the others at the highest threshold that finds 80 % of the outliers, or
            None.
    """

    k: int
    ratio: bool
    method: str
    auroc: float | None
    auprc: float | None
    fpr80: float | None

    @property
    def label(self) -> str:
        """Such as `LLR>2`."""
        return f"{'LLR' if self.ratio else 'L'}>{self.k}"


def metrics(inside: Tensor, outside: Tensor) -> tuple[float, float, float]:
    """AUROC, AUPRC (average precision) and FPR80 of scores that are high for outliers.

    Args:
        inside: Scores of images that are none, (N,), finite.
        outside: Scores of outliers, (M,), finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    truth = np.repeat([0, 1], [len(inside), len(outside)])
    score = torch.cat([inside, outside]).numpy()
    false, true, _ = roc_curve(truth, score, drop_intermediate=False)
    return (
        float(roc_auc_score(truth, score)),
        float(average_precision_score(truth, score)),
        float(false[np.argmax(true >= 0.8)]),
    )


@dataclass(frozen=True)
class Outliers:
    """Scores of two sets of images, and how well they tell them apart.

    Attributes:
        inside: Scores of the first set, by method and k, each (N,), nats.
        outside: Scores of the outliers.
        names: Of the two sets.
        samples: Importance samples.
        sampler: Transition, steps and step size of the chains.
        seed: Image i of either set uses seed + i.
    """

    inside: Mapping[str, Mapping[int, Tensor]]
    outside: Mapping[str, Mapping[int, Tensor]]
    names: tuple[str, str]
    samples: int
    sampler: SamplerConfig
    seed: int

    @property
    def ks(self) -> list[int]:
        """Numbers of skipped groups."""
        return list(self.inside["mode"])

    @property
    def counts(self) -> tuple[int, int]:
        """Images of either set."""
        return len(self.inside["mode"][0]), len(self.outside["mode"][0])

    def score(self, method: str, k: int, ratio: bool) -> tuple[Tensor, Tensor]:
        """Scores of both sets that are high for outliers: LLR^{>k}, or -L^{>k}."""
        sets = (self.inside[method], self.outside[method])
        inside, outside = (s[0] - s[k] if ratio else -s[k] for s in sets)
        return inside, outside

    def detections(self) -> list[Detection]:
        """One per score: all L^{>k}, then all ratios."""
        found = []
        for ratio in (False, True):
            for k in self.ks[1 if ratio else 0 :]:
                for method in METHODS:
                    scores = self.score(method, k, ratio)
                    finite = all(score.isfinite().all() for score in scores)
                    values = metrics(*scores) if finite else (None, None, None)
                    found.append(Detection(k, ratio, method, *values))
        return found

    def problems(self) -> list[str]:
        """A line for each score that is not finite for some image."""
        lines = []
        for name, scores in zip(self.names, (self.inside, self.outside), strict=True):
            for method, values in scores.items():
                for k, value in values.items():
                    if len(bad := (~value.isfinite()).nonzero().flatten()):
                        lines.append(
                            f"L>{k} by {METHODS[method]} is not finite for {len(bad)} of "
                            f"{len(value)} images of {name}, the first is image {bad[0]}: "
                            "nothing is measured with it"
                        )
        return lines

    def to_dict(self) -> dict:
        """Settings and metrics as plain values."""
        return {
            "in": {"name": self.names[0], "images": self.counts[0]},
            "out": {"name": self.names[1], "images": self.counts[1]},
            "detections": [asdict(found) for found in self.detections()],
            "problems": self.problems(),
            "samples": self.samples,
            "sampler": asdict(self.sampler),
            "seed": self.seed,
        }

    def scores_dict(self) -> dict:
        """L^{>k} of every image by method and k, None where it is not finite."""
        return {
            key: {
                method: {
                    str(k): [v if math.isfinite(v) else None for v in value.tolist()]
                    for k, value in values.items()
                }
                for method, values in scores.items()
            }
            for key, scores in (("in", self.inside), ("out", self.outside))
        }

    def table(self) -> Table:
        """A row per score, a column per decision function, as in Tab. 11."""
        rows: dict[str, list[str]] = {}
        for found in self.detections():
            values = (found.auroc, found.auprc, found.fpr80)
            text = " / ".join("-" if v is None else f"{v:.3f}" for v in values)
            rows.setdefault(found.label, []).append(text)
        n, m = self.counts
        return Table(
            f"AUROC / AUPRC / FPR80 of {m} images of {self.names[1]} among {n} of {self.names[0]}",
            ("", *METHODS.values()),
            [(label, *cells) for label, cells in rows.items()],
            f"Chance is AUPRC {m / (n + m):.3f}; {self.samples} importance "
            f"sample{'s' * (self.samples > 1)}; {self.sampler}.",
        )

    def plot(self) -> bytes:
        """Histograms of L^{>k} and LLR^{>k} (Fig. 6) as a PNG file: a column per k."""
        shown = {(found.method, found.k, found.ratio): found for found in self.detections()}
        rows = [(m, ratio) for ratio in (False, True) for m in ("mode", "log_posterior")]
        rows = rows if len(self.ks) > 1 else rows[:2]
        figure, axes = new_figure(len(rows), len(self.ks), (2.7, 2.0))
        for (method, ratio), line in zip(rows, axes, strict=True):
            for k, axis in zip(self.ks, line, strict=True):
                if ratio and not k:
                    axis.set_axis_off()
                    continue
                pair = [s if ratio else -s for s in self.score(method, k, ratio)]
                draw_histograms(axis, pair, self.names)
                found = shown[method, k, ratio]
                title = f"{METHODS[method]}, {found.label}"
                if found.auroc is not None:
                    title += f"\nAUROC {found.auroc:.3f}, AUPRC {found.auprc:.3f}"
                axis.set_title(title, fontsize=8)
                axis.set_yticks([])
        for axis in axes[-1]:
            axis.set_xlabel("nats")
        axes[0, 0].legend(fontsize=7)
        return png(figure)


def draw_histograms(axis: Axes, pair: Sequence[Tensor], names: Sequence[str]) -> None:
    """Densities of finite scores; the outermost bins hold the hundredth that lies beyond."""
    arrays = [values[values.isfinite()].numpy() for values in pair]
    if not len(joined := np.concatenate(arrays)):
        return
    ends = np.percentile(joined, [0.5, 99.5])
    edges = np.histogram_bin_edges(joined.clip(*ends), BINS)
    for values, name, colour in zip(arrays, names, (GAUSSIAN, ENERGY), strict=True):
        if len(values):
            options = {"density": True, "alpha": 0.6, "color": colour}
            axis.hist(values.clip(*ends), edges, label=name, **options)


def detect_outliers(
    prior: EnergyPrior,
    inside: Tensor,
    outside: Tensor,
    ks: Sequence[int] | None = None,
    *,
    names: tuple[str, str] = ("in", "out"),
    samples: int = 1,
    config: SamplerConfig | None = None,
    seed: int = 0,
    batch_size: int = 100,
) -> Outliers:
    """Score two sets of images and measure how well the scores tell them apart (Tab. 11).

    Args:
        prior: Fitted heads.
        inside: Images like those it was fitted on, uint8, (N, C, H, W).
        outside: Outliers, uint8, (M, C, H, W).
        ks: As for `score_images`; `default_k` by default.
        names: Of the two sets.
        samples: Importance samples.
        config: Transition, steps and step size; those stored with the heads by default.
        seed: Image i of either set uses seed + i.
        batch_size: Images at a time.

    Raises:
        EbmPriorError: If a set is empty, or of another shape than the backbone's images.
    """
    groups = len(prior.backbone.groups)
    ks = default_k(groups) if ks is None else sorted({0, *ks})
    config = config or prior.sampler
    for images, name in zip((inside, outside), names, strict=True):
        if not len(images):
            raise EbmPriorError(f"{name} holds no images")
        prior.backbone.check_images(images)
    scores = [
        score_images(
            prior,
            images,
            range(seed, seed + len(images)),
            ks,
            samples=samples,
            config=config,
            batch_size=batch_size,
            name=name,
        )
        for images, name in zip((inside, outside), names, strict=True)
    ]
    return Outliers(*scores, names, samples, config, seed)
