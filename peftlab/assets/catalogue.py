"""The list of models and data that `peftlab` can fetch, read from `assets.json`.

Fields of an entry:

| field | meaning |
| --- | --- |
| kind | `causal-lm`, `encoder` or `dataset` |
| package, version | the wheel that carries the files |
| wheel_sha256, wheel_bytes | the SHA-256 of the wheel, and its size in bytes |
| member | the file in the wheel, or the folder (ending in `/`), that is extracted |
| member_sha256 | of a file; or of each file wanted from the folder; or `tree:` and a whole folder's `tree_hash` |
| recipe | how the cached files are made of the members: `copy`, `gguf` or `news` |
| files | SHA-256 and size in bytes of each file in the finished folder |
| hub, licence | where the original is, and its licence |

Nothing here imports torch.
"""

import functools
import hashlib
import json
from importlib import resources

from peftlab.errors import PeftLabError, did_you_mean


class AssetError(PeftLabError):
    """A model or data set cannot be fetched, or the fetched files are not the expected ones."""


@functools.cache
def catalogue() -> dict[str, dict]:
    """Return all assets by name. Treat the result as read-only."""
    return json.loads(resources.files(__package__).joinpath("assets.json").read_text(encoding="utf-8"))


def entry(name: str) -> dict:
    """Return the entry of an asset. Raise AssetError, with near matches, if there is none."""
    known = catalogue()
    if name not in known:
        raise AssetError(f"There is no asset {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]


def edition(entry: dict) -> str:
    """Return twelve hexadecimal digits that change if, and only if, the finished files change.

    They are part of the cache folder's name, so two versions of this package can share one cache.
    """
    return hashlib.sha256(json.dumps(entry["files"], sort_keys=True).encode()).hexdigest()[:12]


def tree_hash(hashes: dict[str, str]) -> str:
    """Return one hash for many files: the SHA-256 of the lines `<hash>  <path>`, sorted by path.

    `sha256sum $(find . -type f | sort) | sha256sum` prints the same.
    """
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
