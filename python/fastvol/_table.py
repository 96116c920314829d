"""Tables of results, where pandas is installed."""

from __future__ import annotations

from typing import Any

from .errors import FastvolError


def pandas() -> Any:
    """The module.

    Raises:
        FastvolError: it is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise FastvolError("to_dataframe() needs pandas: pip install 'fastvol[table]'") from error
    return pd
