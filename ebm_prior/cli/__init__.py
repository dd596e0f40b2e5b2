"""The `ebm-prior` command: one module per verb, each a thin shell over public functions."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import click

from ebm_prior._version import __version__
from ebm_prior.cli.anomaly import anomaly
from ebm_prior.cli.chains import chains
from ebm_prior.cli.demo import demo
from ebm_prior.cli.evaluate import evaluate
from ebm_prior.cli.fit import fit
from ebm_prior.cli.hierarchy import hierarchy
from ebm_prior.cli.hub import pull, push
from ebm_prior.cli.import_heads import import_heads
from ebm_prior.cli.info import info
from ebm_prior.cli.likelihood import likelihood
from ebm_prior.cli.ood import ood
from ebm_prior.cli.pretrain import pretrain
from ebm_prior.cli.report import report
from ebm_prior.cli.sample import sample
from ebm_prior.cli.train import train
from ebm_prior.cpu import keep_freed_memory
from ebm_prior.errors import EbmPriorError
from ebm_prior.ranks import is_main

__all__ = ["main"]

SHARED = ("fit", "sample", "evaluate")  # verbs that several processes do together


class Cli(click.Group):
    """A group whose every failure is one line, `Error: ...`, and an exit code.

    0 done, 2 wrong usage, 1 anything else; a traceback only with `--debug`.
    """

    def main(  # noqa: D102
        self,
        args: Any = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        keep_freed_memory()
        given = list(sys.argv[1:] if args is None else args)
        args = [arg for arg in given if arg != "--debug"]  # valid before and after the verb
        debug = len(args) < len(given)
        args = args or ["--help"]
        if not debug:
            threading.excepthook = _thread_stopped
        try:
            with warnings.catch_warnings(), nullcontext() if is_main() else _silence():
                warnings.showwarning = _one_line_each()
                code = super().main(args, standalone_mode=False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except click.ClickException as error:
            message, code = error.format_message(), error.exit_code
            if isinstance(error, click.UsageError) and error.ctx is not None:
                message += f" (see {error.ctx.command_path} --help)"
        except (click.Abort, KeyboardInterrupt):
            message, code = "interrupted", 1
        except EbmPriorError as error:
            if debug:
                raise
            message, code = str(error), 1
        except OSError as error:
            if debug:
                raise
            message, code = f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
        except Exception as error:
            if debug:
                raise
            text = str(error).strip().splitlines()
            message = (
                f"unexpected {type(error).__name__}: {text[0] if text else ''}; "
                "run again with --debug for the traceback"
            )
            if _out_of_memory(error):
                message = "out of memory; free some, lower the batch size, or use another --device"
            code = 1
        if is_main() or code == 1:  # wrong usage is the same in every process
            click.echo(f"Error: {_one_line(message)}", err=True)
        sys.exit(code)


def _one_line(message: str) -> str:
    """A message that may quote names in strangers' files, without what moves the cursor."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed outside of chains, which would have gone on with fewer."""
    if isinstance(error, RuntimeError):
        from ebm_prior.micro_batch import out_of_memory

        return out_of_memory(error)
    return isinstance(error, MemoryError)


def _thread_stopped(args: threading.ExceptHookArgs) -> None:
    """No traceback of a full disk from the thread of TensorBoard: its caller raises it too."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing from a process that works for another; its own error is still shown."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _one_line_each() -> Callable[..., None]:
    """Shows each warning once, as one line without the place in the code it comes from."""
    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = f"Warning: {_one_line(str(message))}"
        if line not in shown:
            click.echo(line, err=True)
        shown.add(line)

    return show


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ebm-prior")
@click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback on errors.")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Energy priors for pretrained hierarchical VAEs.

    \b
    ebm-prior fit --ckpt nvae_cifar.pt
    ebm-prior sample --steps 40
    """
    if not is_main() and ctx.invoked_subcommand not in SHARED:
        ctx.exit()  # under torchrun one process is enough for these


for command in (
    fit, sample, evaluate, hierarchy, ood, anomaly, chains, likelihood, report, info, pretrain,
    train, push, pull, import_heads, demo,
):  # fmt: skip
    main.add_command(command)
