"""Order and settings that all tests share: quick tests first, so that a fault shows before the long ones run."""

import os

# before torch or matplotlib is imported by any test
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ORDER = ("unit", "parity", "gpu", "notebooks", "book")


def pytest_collection_modifyitems(session, config, items):
    """Run the folders in the order of ORDER; within one, as pytest found them."""
    root = config.rootpath / "tests"

    def place(item):
        parts = item.path.relative_to(root).parts if item.path.is_relative_to(root) else ()
        return ORDER.index(parts[0]) if parts and parts[0] in ORDER else len(ORDER)

    items.sort(key=place)
