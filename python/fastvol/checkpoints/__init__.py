"""The folder of ``checkpoint=``: what a run has done so far, one file for each piece of work.

``files`` writes and reads one file, ``identity`` says what a folder belongs to, ``folder`` is the
folder, ``laws`` turns a law of directions into arrays and back, ``inspection`` tells what is there.
"""

from __future__ import annotations

from .files import DamagedError, Piece
from .folder import Folder
from .identity import Identity, identify

__all__ = ["DamagedError", "Folder", "Identity", "Piece", "identify"]
