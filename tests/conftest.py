"""Order and settings that all tests share: quick tests first, so that a fault shows before the long ones run."""

import collections
import gc
import os

import pytest

# before torch or matplotlib is imported by any test
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers: two threads each would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if not os.path.exists("/dev/nvidiactl"):  # without a GPU, Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

gc.disable()  # until the tests are collected: torch and transformers leave nothing behind that is worth a search

LAST = pytest.StashKey()
ORDER = ("unit", "parity", "gpu", "notebooks", "book")


def folder(item) -> str:
    """The folder of tests/ in which a test lies."""
    root = item.config.rootpath / "tests"
    return item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run the folders in the order of ORDER; within one, as pytest found them.

    Several workers (`-n 2 --dist loadgroup --no-loadscope-reorder`) start with what takes longest, so that none waits
    for another in the end: with the last folder, then with what is marked as slow, then with the longest files.
    A file stays with one worker: what it loads and builds once is then loaded and built once. The rendered pages stay
    with one worker, which builds the book once. Each notebook and each slow test goes to whoever is free.
    """
    several = "PYTEST_XDIST_WORKER" in os.environ
    order = ORDER[::-1] if several else ORDER
    slow = {item for item in items if several and item.get_closest_marker("slow")}
    length = collections.Counter(item.path for item in items if several)

    def place(item):
        known = order.index(folder(item)) if folder(item) in order else len(order)
        # the folders of short tests are one: a long file of any of them comes before a short one
        return (min(known, 2), item not in slow, -length[item.path], item.path) if several else known

    items.sort(key=place)
    for item in items if several else ():
        if folder(item) == "book":
            item.add_marker(pytest.mark.xdist_group("book"))
        elif item not in slow and not item.get_closest_marker("xdist_group") and folder(item) != "notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_collection_finish():
    gc.set_threshold(20_000, 20, 20)  # a model of a test is thousands of objects, and most of them are gone with it
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Let Python's search for garbage leave alone what there was before this file's first test.

    torch, transformers and the tests are half a million objects that stay, and each search went through them all: it
    took an eighth of the time.
    """
    if item.path != item.config.stash.get(LAST, None):
        item.config.stash[LAST] = item.path
        gc.collect()
        gc.freeze()
