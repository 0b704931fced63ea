"""Order and settings that all tests share: quick tests first, so that a fault shows before the long ones run."""

import os

import pytest

# before torch or matplotlib is imported by any test
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers: two threads each would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ORDER = ("unit", "parity", "gpu", "notebooks", "book")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session, config, items):
    """Run the folders in the order of ORDER; within one, as pytest found them.

    Several workers (`-n 2 --dist loadgroup`) start with what takes longest, so that none waits for another in the end:
    with the last folder, and in each with the tests that are marked as slow.
    The rendered pages stay with one worker, which builds the book once.
    """
    root = config.rootpath / "tests"
    several = "PYTEST_XDIST_WORKER" in os.environ
    order = ORDER[::-1] if several else ORDER

    def folder(item):
        parts = item.path.relative_to(root).parts if item.path.is_relative_to(root) else ()
        return parts[0] if parts else ""

    def place(item):
        quick = not (several and item.get_closest_marker("slow"))
        return order.index(folder(item)) if folder(item) in order else len(order), quick

    items.sort(key=place)
    for item in items if several else ():
        if folder(item) == "book":
            item.add_marker(pytest.mark.xdist_group("book"))
