"""Two networks with the same training loss, one of them taught some lies: whose basin is larger?

Both start from the same parameters and are trained on the same few handwritten digits until the
loss on their own training set is the same; the poisoned twin's set also holds images with labels
that are always wrong. Both basins are then measured on the clean images alone, along the same
directions and under the same threshold. What comes out is computed; nothing here knows it before.

``training.py`` makes the networks, ``twins.py`` measures them, ``words.py`` and ``figure.py`` tell.
"""

from __future__ import annotations

from .figure import check_figure, draw
from .twins import Demo, Twin, run
from .words import finding, table, title

__all__ = ["Demo", "Twin", "check_figure", "draw", "finding", "run", "table", "title"]
