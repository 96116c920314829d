"""Progress bars; none at all where nobody wants one.

Even a bar that shows nothing takes a lock that tqdm shares with all processes that are forked off
this one: where one of them is killed while it holds it, the others wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Silent:
    """What a bar can be told, to no effect."""

    def update(self, n: int) -> None:
        """So much more is done."""

    def set_postfix_str(self, words: str, *, refresh: bool = True) -> None:
        """What to say beside it."""


@contextmanager
def progress_bar(total: int, unit: str, *, shown: bool) -> Iterator[Any]:
    """A bar over ``total`` of a ``unit``; silent where there is no terminal."""
    if not shown:
        yield Silent()
        return
    from tqdm.auto import tqdm

    # None: shown on a terminal only.
    with tqdm(total=total, unit=unit, unit_scale=True, disable=None) as bar:
        yield bar
