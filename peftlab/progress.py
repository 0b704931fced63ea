"""A progress bar for terminals and notebooks that leaves nothing behind.

A notebook's stored outputs must be the same each time it runs, so a bar may leave no trace in them. The usual bars do:
a bar on stderr is stored as text, a widget stays in the cell after it is closed, and `clear_output` also removes the
other outputs of the cell (and nbval ignores it). So the bar depends on who is watching:

- a terminal (stderr is a TTY): one line that is rewritten, and removed at the end;
- a notebook in front of a person: a display that is updated in place and ends empty;
- anything else (nbclient, nbval, papermill, a log file): nothing.

Each execute request to a kernel carries `allow_stdin`. JupyterLab, Colab and VS Code set it, because their user can
answer `input()`. Programs that execute notebooks leave it unset. The environment variable `PEFTLAB_PROGRESS` overrides
this: `off` or `on`.
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
    """A bar that counts to `total`. Use it in a `with` block, which removes it even after an error.

    Args:
        total: the number of units of work, or None if it is unknown.
        description: one or two words that say what is going on.
        unit: the word for one unit of work.
        enabled: False draws nothing, whoever is watching.
        initial: units that were done earlier, in a resumed run. They do not count for the speed.
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
        """Count `amount` more units. `note` is shown after the bar, for example `"loss 0.71"`."""
        self.done += amount
        self._note = note or self._note
        if self._view is not None and time.monotonic() - self._drawn_at >= INTERVAL:
            self._draw()

    def close(self) -> None:
        """Remove the bar."""
        if self._view is not None:
            self._view.wipe()
            self._view = None

    def line(self) -> str:
        """Return the bar as one line: `Training  [####----] 12/60 · 1.9 step/s · 0:25 left · loss 0.71`."""
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
    """Yield the `items` and show a bar meanwhile. `total` defaults to `len(items)` if that is known."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(total, description, unit=unit, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.update()


def _clock(seconds: float) -> str:
    """Return a time such as `0:07`, `12:30` or `1:02:03`."""
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
    """One output of a notebook cell, updated in place. It ends empty, so no old bar stays when the work is done."""

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
    """Return where a bar may be drawn now, or None if nobody is watching."""
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
    """Return the Jupyter kernel of this process, or None. IPython is not imported: in a kernel it is already loaded."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)
