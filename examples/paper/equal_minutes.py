"""Equal minutes each: time methods side by side, train them as long, measure them alike."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click

NCE_SHARE = 1 / 4  # of the minutes, for the heads; their frozen generator gets the rest
NCE_ITERATIONS = 6000  # at most; the fit stops by itself
WARM_UP, TIMED, ROUNDS = 2, 2, 3  # iterations per visit to a method, and visits


class Method(NamedTuple):
    """What is trained: `ebm-prior train` with these settings, then perhaps heads by NCE."""

    settings: dict
    nce: bool = False

    def name(self, base: dict) -> str:
        """Of its folder; the same for what two tables share."""
        changed = [
            f"{key}{'x'.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in self.settings.items()
            if key not in ("method", "prior") and value != base[key]
        ]
        kind = [self.settings["method"], self.settings["prior"], *["nce"] * self.nce]
        return "-".join([*kind, *changed])


def generator_size(settings: dict, shape: list[int]) -> int:
    """Parameters of p(x|z) and p(z), without the inference network."""
    import torch

    from backbones.generator import Generator
    from backbones.generator.config import TrainConfig

    with torch.device("meta"):
        model = Generator(TrainConfig(**settings).generator(tuple(shape)))
    return sum(p.numel() for part in (model.p_z, model.p_x) for p in part.parameters())


def stored(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass(frozen=True)
class Comparison:
    """What all methods of a folder have in common."""

    data: str
    shape: list[int]
    base: dict
    minutes: float
    seed: int
    device: str
    threads: int
    features: list[str]  # options of `evaluate`

    def clock(self) -> float:
        """Seconds of processor time; elsewhere of wall time: a step waits for its loss."""
        return time.process_time() if self.device == "cpu" else time.perf_counter()

    def stamps(self, method: Method, images, folder: str, iterations: int) -> list[float]:
        """The time after every iteration of a short training in this process."""
        from ebm_prior.registry import JOINT_GROUP, find_trainer

        found = []
        find_trainer("generator", JOINT_GROUP)(
            images,
            out=Path(folder, "run"),
            dataset="timing",
            device=self.device,
            progress=lambda *_: found.append(self.clock()),
            **{**self.base, **method.settings, "iterations": iterations, "sample_every": 0},
        )
        return found

    def time_methods(self, plan: dict[str, Method], images) -> dict[str, dict[str, float]]:
        """Median seconds of an iteration, methods taking turns so that all meet the same load."""
        import numpy as np
        from tqdm import tqdm

        joint = [name for name, method in plan.items() if not method.nce]
        found = {name: [] for name in joint}
        for name in tqdm(joint * ROUNDS, "timing", disable=None):
            with tempfile.TemporaryDirectory() as folder:  # one more: the last also checks
                stamps = self.stamps(plan[name], images, folder, WARM_UP + TIMED + 1)
            found[name] += np.diff(stamps)[WARM_UP - 1 : -1].tolist()
        fits = {name: self.time_fit(plan[name], images) for name in plan.keys() - found.keys()}
        return {name: {"iteration": float(np.median(found[name]))} for name in joint} | fits

    def time_fit(self, method: Method, images) -> dict[str, float]:
        """Seconds of an iteration of the NCE fit, and of what is around them: encoding."""
        from ebm_prior import EnergyPrior, FitConfig, fit, load_backbone

        with tempfile.TemporaryDirectory() as folder:
            self.stamps(method, images, folder, 1)
            path = Path(folder, "run", "backbone.safetensors")
            backbone = load_backbone("generator", path, self.device)
            prior = EnergyPrior.for_backbone(backbone, "factorized", ndf=self.base["ndf"])
            saves, began = [], self.clock()
            config = FitConfig(nce_iterations=200, save_every=100, sample_every=0)
            run = Path(folder, "heads")
            fit(prior, images, config, run_dir=run, on_save=lambda _: saves.append(self.clock()))
            each = (saves[1] - saves[0]) / 100
            return {"iteration": each, "around": self.clock() - began - 200 * each}

    def call(self, *args: object) -> str:
        """Run `ebm-prior` in a process of its own; what it printed."""
        args = [*map(str, args), "--device", self.device]
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "ebm_prior", *args]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise click.ClickException(f"failed: ebm-prior {' '.join(args)}")
        return done.stdout

    def once(self, verb: str, folder: Path, *args: object) -> None:
        """Make a run, unless it is finished; an interrupted one goes on."""
        config = stored(folder / "config.json")
        if not config or config["training"]["status"] != "finished":
            args = [*args, *["--resume"] * bool(config)]
            self.call(verb, "--out", folder, "--data", self.data, "--seed", self.seed, *args)

    def run(self, name: str, method: Method, seconds: dict, out: Path, n: int) -> dict:
        """Train and measure one method; its numbers."""
        budget = 60 * self.minutes
        spent = 0.0
        if method.nce:  # no more than the heads can use: the generator gets the rest
            most = seconds[name]["around"] + NCE_ITERATIONS * seconds[name]["iteration"]
            spent = min(NCE_SHARE * budget, most)
        generator = seconds[Method(method.settings).name(self.base)]["iteration"]
        settings = self.base | method.settings
        settings["iterations"] = max(1, round((budget - spent) / generator))
        folder = out / name
        pairs = (f"--set={key}={json.dumps(value)}" for key, value in settings.items())
        self.once("train", folder, *pairs)
        if method.nce:
            count = (spent - seconds[name]["around"]) / seconds[name]["iteration"]
            count = min(NCE_ITERATIONS, max(1, round(count)))
            checkpoint, folder = folder / "backbone.safetensors", out / f"{name}-heads"
            heads = ["--heads", "factorized", "--ndf", self.base["ndf"], "--nce-iterations", count]
            self.once("fit", folder, "--ckpt", checkpoint, *heads)
        evaluation = self.evaluate(method, folder, out / f"{name}-n{n}.json", n)
        return evaluation | {
            "run": str(folder),
            "seconds_per_iteration": seconds[name]["iteration"],
            "iterations": stored(folder / "config.json")["training"]["result"]["iterations"],
            "generator_parameters": generator_size(settings, self.shape),
        }

    def evaluate(self, method: Method, folder: Path, kept: Path, n: int) -> dict:
        """Distances of a finished run, and its heads' parameters."""
        from safetensors.torch import load_file

        from ebm_prior.files import write_json

        if not kept.exists():
            more = ["--baselines"] * method.nce
            reference = kept.parent / "reference.npz"
            args = ["--heads", folder, "--data", self.data, "-n", n, "--reference", reference]
            found = self.call("evaluate", *args, *self.features, *more, "--json")
            write_json(kept, json.loads(found))
        found = stored(kept)
        tilted = method.nce or method.settings["prior"] == "ebm"
        heads = load_file(folder / "heads.safetensors").values() if tilted else []
        sets = {k: v for k, v in found.items() if isinstance(v, dict) and "frechet" in v}
        frechet = {name: quality["frechet"] for name, quality in sets.items()}
        return {
            "frechet": frechet.pop("energy" if tilted else "gaussian"),
            "others": frechet,
            "features": found["energy"]["features"],
            "head_parameters": sum(weight.numel() for weight in heads),
        }
