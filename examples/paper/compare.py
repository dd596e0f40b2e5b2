"""Tables 1, 5, 6, 7 and 8: priors and ways to train them compared, equal minutes each.

    python examples/paper/compare.py --data mnist --minutes 3 --jobs 2

All methods train the same kind of generator for the same time: their iterations are timed side
by side, and each gets as many as the minutes pay for. Then all are measured alike. The tables are
printed and kept in the folder, as compare.txt and compare.json. What is finished is not done
again: the same command goes on where it was, and more --tables can be asked for later.

Minutes are of processor time on the CPU and of wall time elsewhere, so that on the CPU runs
beside each other (--jobs) cost no method anything. By default generators are narrow and learn at
high rates, as in a few minutes they must; from about 5000 iterations on energies run away at
them, and --set heads_lr=0.00002 does better. Nearer to the paper: also --set ngf=128 --set
ndf=200 --set batch_size=100 --set generator_lr=0.0001; its heads of unequal depth are those of
`ebm-prior train --preset table1`.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
from equal_minutes import Comparison, Method, generator_size, stored

SMALL = {
    "latents": [100, 100], "ngf": 16, "ndf": 100, "prior_steps": 40, "batch_size": 32,
    "generator_lr": 1e-3, "heads_lr": 1e-4,
}  # fmt: skip
MLE = {"method": "mle", "prior": "ebm"}
INFERENCE = {"method": "variational", "prior": "ebm"}
VAE = {"method": "variational", "prior": "gaussian"}
ABP = {"method": "mle", "prior": "gaussian"}
TABLES = ("1", "5", "6", "7", "8")


def rows_of(table: str, base: dict, shape: list[int]) -> dict[str, Method]:
    """The rows of one of the paper's tables."""
    if table == "1":
        return {
            "Gaussian prior, inference (VAE)": Method(VAE),
            "Gaussian prior, MCMC (ABP)": Method(ABP),
            "NCE prior (as NCP-VAE)": Method(VAE, nce=True),
            "EBM of one layer (LEBM)": Method(MLE | {"latents": base["latents"][-1:]}),
            "ours, MCMC": Method(MLE),
            "ours, inference": Method(INFERENCE),
        }
    if table == "5":
        rows = {"ours, inference": Method(INFERENCE), "Gaussian, same generator": Method(VAE)}
        for factor in (2, 4, 8):
            ngf = wider(base, shape, factor)
            rows[f"Gaussian, {factor}x parameters"] = Method(VAE | {"ngf": ngf})
        return rows
    if table == "6":
        return {f"{ndf} hidden units": Method(MLE | {"ndf": ndf}) for ndf in (10, 20, 50, 100)}
    if table == "7":
        return {"MCMC": Method(MLE), "inference": Method(INFERENCE)}
    return {f"k = {k}": Method(MLE | {"prior_steps": k}) for k in (10, 20, 40, 80, 100)}


def wider(base: dict, shape: list[int], factor: int) -> int:
    """The least `ngf` with so many times the parameters."""
    wanted = factor * generator_size(base, shape)
    widths = itertools.count(base["ngf"])
    return next(w for w in widths if generator_size(base | {"ngf": w}, shape) >= wanted)


def text(table: str, rows: dict[str, dict | None], note: str) -> str:
    """A table for the terminal."""
    from ebm_prior.tables import Table

    header = ("", "Fréchet", "reconstructions", "s/iteration", "iterations", "generator", "heads")
    cells = []
    for label, row in rows.items():
        if row is None:
            cells.append((label, "failed", *["-"] * 5))
            continue
        counts = (row[k] for k in ("iterations", "generator_parameters", "head_parameters"))
        frechet = (row["frechet"], row["others"]["reconstruction"])
        each = f"{row['seconds_per_iteration']:.3g}"
        cells.append((label, *(f"{v:.2f}" for v in frechet), each, *map(str, counts)))
        baselines = row["others"].keys() - {"gaussian", "energy", "reconstruction"}
        for name in sorted(baselines):  # priors of the same generator that need no heads
            cells.append((f"  {name.replace('_', ' ')}", f"{row['others'][name]:.2f}", *["-"] * 5))
    return Table(f"Table {table}", header, cells, note).text()


@click.command(context_settings={"show_default": True})
@click.option("--data", default="mnist", help="As `ebm-prior train` takes it.")
@click.option("--tables", default=",".join(TABLES), help="Which of the paper's.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=3.0, help="Each.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="For all methods, as "
              f"`ebm-prior train` takes it; some have a default here: {SMALL}.")  # fmt: skip
@click.option("-n", type=click.IntRange(min=2), default=2000, help="Samples to measure.")
@click.option("--features", help="As `ebm-prior evaluate` takes it.", show_default="by image size")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--device", default="cpu")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Of each process.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Processes side by side.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/paper/compare"))
def main(data, tables, minutes, settings, n, features, seed, device, threads, jobs, out):
    """Compare priors and ways to train them, equal minutes each (Tables 1, 5, 6, 7, 8)."""
    if unknown := sorted({*tables.split(",")} - {*TABLES}):
        raise click.UsageError(f"--tables {','.join(unknown)}: known are {', '.join(TABLES)}")
    import torch

    from ebm_prior.cli.fit import absolute
    from ebm_prior.cli.pretrain import parse_setting
    from ebm_prior.cpu import keep_freed_memory
    from ebm_prior.data import load_images
    from ebm_prior.files import write_json, write_text

    keep_freed_memory()
    torch.set_num_threads(threads)
    base, shown = SMALL | dict(map(parse_setting, settings)), ["--features", features]
    images = load_images(data, split="train").images
    common = Comparison(
        absolute(data), list(images.shape[1:]), base, minutes, seed, device, threads,
        shown if features else [],
    )  # fmt: skip
    before = stored(out / "settings.json") or asdict(common)
    if changed := [key for key, value in asdict(common).items() if before[key] != value]:
        raise click.UsageError(f"{out} was begun with other {', '.join(changed)}; another --out?")

    rows = {table: rows_of(table, base, common.shape) for table in tables.split(",")}
    plan = {method.name(base): method for table in rows.values() for method in table.values()}
    seconds = stored(out / "seconds.json")
    if missing := {name: method for name, method in plan.items() if name not in seconds}:
        seconds |= common.time_methods(missing, images)
        write_json(out / "settings.json", asdict(common))  # not before they were found to work
        write_json(out / "seconds.json", seconds)
    reference = out / "reference.npz"
    if not reference.exists():
        common.call("evaluate", "stats", "--data", data, "--out", reference, *common.features)
    results = {}
    with ThreadPoolExecutor(jobs) as pool:
        running = {k: pool.submit(common.run, k, m, seconds, out, n) for k, m in plan.items()}
        try:
            for name, job in running.items():
                try:
                    results[name] = job.result()
                except click.ClickException as error:  # the others are none the worse
                    click.echo(f"{name} {error.message}", err=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    found = {t: {k: results.get(m.name(base)) for k, m in rows[t].items()} for t in rows}
    used = ", ".join({result["features"] for result in results.values()})
    note = f"{minutes:g} minutes each; {n} samples; features: {used}"
    if any(method.nce for method in plan.values()):
        note += "; iterations of the NCE prior: its heads', the rest went into its generator"
    tables = "\n\n".join(text(table, found[table], note) for table in found)
    write_json(out / "compare.json", {"settings": asdict(common), "n": n, "tables": found})
    write_text(out / "compare.txt", f"{tables}\n")
    click.echo(tables)
    if len(results) < len(plan):
        raise click.ClickException("some methods failed, see above; the same command tries again")


if __name__ == "__main__":
    from ebm_prior.errors import EbmPriorError

    try:
        main()
    except EbmPriorError as error:
        raise SystemExit(f"Error: {error}") from None
