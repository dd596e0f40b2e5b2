"""Stop long work on Ctrl-C without losing any."""

from __future__ import annotations

import signal

from ebm_prior.errors import EbmPriorError

__all__ = ["CtrlC", "Interrupted"]


class Interrupted(EbmPriorError):
    """Ctrl-C: the current iteration was finished and the state saved."""


class CtrlC:
    """Context that turns the first SIGINT into a flag; a second one stops at once."""

    pressed = False

    def __enter__(self) -> CtrlC:
        def press(*_: object) -> None:
            self.pressed = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            self.previous = signal.signal(signal.SIGINT, press)
        except ValueError:  # not the main thread: the caller handles interrupts
            self.previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
