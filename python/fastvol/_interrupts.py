"""Ctrl-C and SIGTERM: nothing is left halfway, and the error says how much is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ._work import Work
from .errors import Interrupted


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def interruptible(work: Work) -> Iterator[None]:
    """What is inside ends in an :class:`Interrupted` after Ctrl-C or SIGTERM.

    A handler of SIGTERM is installed in the main thread only, where the caller has none of his own,
    and taken away afterwards.
    """
    try:
        with _termination():
            try:
                yield
            finally:
                work.close()
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        how = "ended by SIGTERM" if isinstance(error, _Terminated) else "interrupted"
        if str(error):
            how += f" ({error})"
        raise Interrupted(
            f"{how} {_how_far(work)}", work.n_done, work.n, work.kept_in or None
        ) from error


def _how_far(work: Work) -> str:
    if not work.n:
        done = "before the first direction was settled"
    else:
        done = f"after {work.n_done:,} of {work.n:,} {work.unit}"
    if work.on_interrupt == "return":
        done += ", from which no estimate can be made"
    if work.folder is None:
        return f"{done}; nothing is kept: with checkpoint=DIR the same call would continue"
    return f"{done}; they lie in {work.kept_in}, and the same call continues"


@contextmanager
def _termination() -> Iterator[None]:
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
