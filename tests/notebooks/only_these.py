"""Put into a kernel's path as `sitecustomize`: hides every package that a chapter's set-up cell does not bring.

The tests' own environment holds more than a reader has. In a kernel (and nowhere else) the packages named in
PEFTLAB_HIDDEN, separated by commas, look as if they were not installed.
"""

import os
import sys
from importlib.machinery import PathFinder

hidden = set(filter(None, os.environ.get("PEFTLAB_HIDDEN", "").split(",")))
if hidden and any("ipykernel_launcher" in argument for argument in sys.orig_argv):
    find = PathFinder.find_spec

    def find_spec(fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in hidden else find(fullname, path, target)

    PathFinder.find_spec = staticmethod(find_spec)
