"""Numbers for people. A GB is 1e9 bytes and a GiB is 2**30 bytes; both are always named, never mixed."""

from __future__ import annotations

_DECIMAL = ("bytes", "kB", "MB", "GB", "TB", "PB")
_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(size: float, binary: bool = False) -> str:
    """`14400000000` as `"14.40 GB"`, or with `binary` as `"13.41 GiB"`."""
    base, units = (1024.0, _BINARY) if binary else (1000.0, _DECIMAL)
    value, unit = float(size), 0
    while abs(value) >= base and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    return f"{value:.0f} {units[0]}" if unit == 0 else f"{value:.2f} {units[unit]}"


def format_both(size: float) -> str:
    """`14400000000` as `"14.40 GB (13.41 GiB)"`."""
    return f"{format_bytes(size)} ({format_bytes(size, binary=True)})"


def format_count(number: int) -> str:
    """`6738415616` as `"6,738,415,616"`."""
    return f"{number:,}"


def format_percent(percent: float) -> str:
    """Three significant figures: `"0.0622 %"`, `"1.07 %"`, `"100 %"`."""
    return f"{percent:.3g} %" if percent >= 0.001 or percent == 0 else f"{percent:.1e} %"
