"""A progress bar for terminals and notebooks that leaves nothing behind.

A notebook's stored outputs must be the same each time it runs, so a bar may leave no trace in them. Neither of the
usual roads gives that: a bar on stderr is stored as text, a widget stays in the cell after it is closed, and
``clear_output`` takes the cell's other outputs with it (and nbval does not follow it). So the bar asks who is watching:

- a terminal (stderr is a TTY): one line that is rewritten, and wiped at the end;
- a notebook in front of a person: a display that is updated in place and ends empty;
- anything else (nbclient, nbval, papermill, a log file): nothing at all.

A front end says whether a person is there: each execute request carries ``allow_stdin``, which JupyterLab, Colab and
VS Code set, because their user can answer ``input()``, and which programs that execute notebooks leave unset. The
environment variable ``PEFTLAB_PROGRESS`` overrides the answer: ``off`` or ``on``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
WIDTH = 24  # characters of the bar itself
INTERVAL = 0.2  # seconds between two drawings


class Bar:
    """A bar that counts to ``total``; use it in a ``with`` block, which wipes it also when an error ends the work.

    Args:
        total: the number of units of work, or None when nobody knows.
        description: what is going on, a word or two.
        unit: the word for one unit of work.
        enabled: False draws nothing, whoever is watching.
        initial: units that were done before (a resumed run starts here); they do not count for the rate.
    """

    def __init__(
        self, total: int | None, description: str = "", *, unit: str = "step", enabled: bool = True, initial: int = 0
    ):
        self.total, self.description, self.unit = total, description, unit
        self.done = self.initial = initial
        self._started = time.monotonic()
        self._drawn_at = float("-inf")
        self._note = ""
        self._view = _view() if enabled else None

    def __enter__(self) -> Bar:
        self._draw()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more units; ``note`` is shown behind the bar, for example ``"loss 0.71"``."""
        self.done += amount
        self._note = note or self._note
        if self._view is not None and time.monotonic() - self._drawn_at >= INTERVAL:
            self._draw()

    def close(self) -> None:
        """Wipe the bar."""
        if self._view is not None:
            self._view.wipe()
            self._view = None

    def line(self) -> str:
        """The bar as one line of text: ``Training  [####----] 12/60 · 1.9 step/s · 0:25 left · loss 0.71``."""
        parts = []
        if self.total:
            filled = min(WIDTH, WIDTH * self.done // self.total)
            parts.append(f"[{'#' * filled}{'-' * (WIDTH - filled)}] {self.done}/{self.total}")
        else:
            parts.append(f"{self.done} {self.unit}s")
        elapsed = time.monotonic() - self._started
        fresh = self.done - self.initial
        if fresh > 0 and elapsed > 0:
            rate = fresh / elapsed
            slow = rate < 0.5
            parts.append(f"{1 / rate:.1f} s/{self.unit}" if slow else f"{rate:.1f} {self.unit}/s")
            if self.total:
                parts.append(f"{_clock((self.total - self.done) / rate)} left")
        if self._note:
            parts.append(self._note)
        return (self.description + "  " if self.description else "") + " · ".join(parts)

    def _draw(self) -> None:
        if self._view is not None:
            self._drawn_at = time.monotonic()
            self._view.show(self.line())


def track(
    items: Iterable[Item],
    description: str = "",
    *,
    total: int | None = None,
    unit: str = "item",
    enabled: bool = True,
) -> Iterator[Item]:
    """Yield the ``items`` under a bar; ``total`` defaults to ``len(items)`` where that is known."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(total, description, unit=unit, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.update()


def _clock(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``1:02:03``."""
    minutes, seconds = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Terminal:
    """One line on stderr, rewritten in place."""

    def show(self, line: str) -> None:
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            width = 80
        # ESC[K clears what a longer line left behind
        sys.stderr.write("\r" + line[: max(1, width - 1)] + "\x1b[K")
        sys.stderr.flush()

    def wipe(self) -> None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


class _Display:
    """One output of a notebook cell, updated in place; it ends empty, so no stale bar stays when the work is done."""

    def __init__(self) -> None:
        self._handle = None

    def show(self, line: str) -> None:
        from IPython.display import display

        data = {"text/plain": line}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def wipe(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)


def _view() -> _Terminal | _Display | None:
    """Where a bar may be drawn now; None where nobody is watching."""
    wish = os.environ.get("PEFTLAB_PROGRESS", "auto").lower()
    if wish in ("off", "0", "no", "false"):
        return None
    kernel = _kernel()
    if kernel is not None:
        return _Display() if wish == "on" or getattr(kernel, "_allow_stdin", False) else None
    if wish == "on" or (sys.stderr is not None and sys.stderr.isatty()):
        return _Terminal()
    return None


def _kernel() -> object | None:
    """The Jupyter kernel this process is, or None. Never imports IPython: in a kernel it is loaded already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)
