"""A plugin for nbval: numbers may move as far as their cell says, and what prose says is computed again.

Without it nbval compares outputs character by character. A cell whose numbers differ a little between machines states
in its metadata how far they may move (book/_ext/portable.py has the form); the words between them stay strict. After
each cell, the values that it gives to the prose and to the figure's description are evaluated in the kernel, and
compared with what is stored.
"""

import copy

import portable
import pytest
from nbval.plugin import IPyNbCell

strictly = IPyNbCell.compare_outputs


def compare_outputs(cell, test, ref, skip_compare=None):
    tolerance = portable.settings(cell.cell).get("tolerance")
    return strictly(cell, settled(test, ref, tolerance) if tolerance else test, ref, skip_compare)


def settled(fresh: list, stored: list, tolerance: dict) -> list:
    """The fresh outputs, with the stored text in place of each text that is near enough to it."""
    fresh = copy.deepcopy(fresh)
    for new, old in zip(fresh, stored, strict=False):
        for holder, before in ((new, old), (new.get("data", {}), old.get("data", {}))):
            for key, text in holder.items():
                if isinstance(text, str) and isinstance(before.get(key), str) and key.startswith("text"):
                    if portable.near(before[key], text, tolerance) is None:
                        holder[key] = before[key]
    return fresh


IPyNbCell.compare_outputs = compare_outputs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if isinstance(item, IPyNbCell) and (wanted := portable.expressions(item.cell)):
        client = item.parent.kernel.kc
        asked = client.execute("", silent=True, user_expressions=wanted)
        while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != asked:
            pass
        stored = portable.stored_values(item.parent.nb)
        stored["alt"] = item.cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        tolerance = portable.settings(item.cell).get("tolerance", {})
        for name, text in portable.evaluated(reply).items():
            if differs := portable.near(stored.get(name, ""), text, tolerance):
                pytest.fail(f"the prose's value {name}: {differs}", pytrace=False)
    return result
