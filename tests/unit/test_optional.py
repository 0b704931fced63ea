"""A package that is missing is one line that says what to install."""

import sys

import pytest

import peftlab as pl
from peftlab import optional


@pytest.fixture
def without(monkeypatch):
    """Make packages unimportable, as if they were not installed or broken."""

    def hide(name, error=None):
        real = optional.importlib.util.find_spec
        monkeypatch.setattr(
            optional.importlib.util, "find_spec", lambda n, *a: None if n == name and error is None else real(n, *a)
        )

        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                if fullname.partition(".")[0] == name:
                    raise error or ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

        for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        optional.load.cache_clear()

    yield hide
    optional.load.cache_clear()


@pytest.mark.parametrize("name", optional.PACKAGES)
def test_a_missing_package_is_one_line_that_says_what_to_install(name, without):
    without(name)
    assert optional.available(name) is None
    with pytest.raises(pl.PeftLabError, match=f'{name} is not installed.*pip install "{name}>=') as told:
        optional.require(name)
    assert "\n" not in str(told.value)


def test_a_broken_package_says_why(without, monkeypatch):
    broken = OSError("libcudart.so.13: cannot open shared object file")
    monkeypatch.setattr(optional.importlib, "import_module", lambda name: (_ for _ in ()).throw(broken))
    optional.load.cache_clear()
    with pytest.raises(pl.PeftLabError, match="importing it fails \\(OSError: libcudart.so.13"):
        optional.require("bitsandbytes")


def test_figures_without_matplotlib_say_what_to_install(without, monkeypatch):
    for loaded in [m for m in sys.modules if m.startswith("peftlab.") and "figures" in m]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(vars(pl), "figures", raising=False)
    without("matplotlib")
    with pytest.raises(pl.PeftLabError, match="matplotlib is not installed"):
        _ = pl.figures
