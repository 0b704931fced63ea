"""Numbers for people. A GB is 1e9 bytes and a GiB is 2**30 bytes; both are always named, never mixed."""

from __future__ import annotations

from peftlab.checks import checked

_DECIMAL = ("bytes", "kB", "MB", "GB", "TB", "PB")
_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@checked()
def format_bytes(size: float, binary: bool = False) -> str:
    """Write a number of bytes with a unit, in steps of 1000 or, with `binary`, of 1024.

    >>> pl.memory.format_bytes(14_400_000_000), pl.memory.format_bytes(14_400_000_000, binary=True)
    ('14.40 GB', '13.41 GiB')
    """
    base, units = (1024.0, _BINARY) if binary else (1000.0, _DECIMAL)
    value, unit = float(size), 0
    while abs(value) >= base and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    return f"{value:.0f} {units[0]}" if unit == 0 else f"{value:.2f} {units[unit]}"


@checked()
def format_both(size: float) -> str:
    """Write a number of bytes in both units.

    >>> pl.memory.format_both(14_400_000_000)
    '14.40 GB (13.41 GiB)'
    """
    return f"{format_bytes(size)} ({format_bytes(size, binary=True)})"


@checked()
def format_count(number: int) -> str:
    """Write a count with commas.

    >>> pl.memory.format_count(6_738_415_616)
    '6,738,415,616'
    """
    return f"{number:,}"


@checked()
def format_percent(percent: float) -> str:
    """Write a percentage with three significant figures.

    >>> pl.memory.format_percent(0.06224), pl.memory.format_percent(100)
    ('0.0622 %', '100 %')
    """
    return f"{percent:.3g} %" if percent >= 0.001 or percent == 0 else f"{percent:.1e} %"
