"""Where pictures are drawn. matplotlib is imported only here, and only when one is."""

from __future__ import annotations

from typing import Any


def canvas() -> Any:
    """pyplot, drawing into files only.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("matplotlib is not installed (pip install 'rankwise[plots]')") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
