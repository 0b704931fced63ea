"""Renew the JavaScript that the rendered book serves itself, so that a page asks no other host for anything.

    python tools/vendor.py            fetch the versions named below with npm, copy the needed files, write the manifest
    python tools/vendor.py --check    compare the files in the checkout with the manifest

The files lie in book/_static/vendor (and axe-core, which only the tests use, in tests/book/vendor), each package in its
own folder with its licence; manifest.json holds the version, the licence and the SHA-256 of every file. Readers and
tests need no npm: the files are part of the repository.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "book" / "_static" / "vendor"
TESTS = ROOT / "tests" / "book" / "vendor"

# MathJax loads these TeX extensions at the first use of a macro; `all-packages` and the chemistry ones are left out.
MATHJAX_EXTENSIONS = [
    "action", "amscd", "bbox", "boldsymbol", "braket", "cancel", "cases", "centernot", "color", "colortbl", "colorv2",
    "empheq", "enclose", "extpfeil", "gensymb", "html", "mathtools", "newcommand", "tagformat", "textcomp",
    "textmacros", "unicode", "upgreek", "verb",
]  # fmt: skip

# MathJax' own bundles hold a menu that the site does not show, which is a third of them. So the components that it
# needs are put one behind the other, and the loader in the first one is told that they are there. The last one writes
# the MathML that screen readers read.
MATHJAX_PARTS = ["core", "input/tex", "output/chtml", "output/chtml/fonts/tex", "a11y/assistive-mml"]
MATHJAX = "tex-chtml.js"

# Python compiled to WebAssembly, its glue and its standard library. Packed, the first is a third as large; the page
# unpacks it. Its name does not end in .gz, because with some servers the browser would have unpacked it already.
PYODIDE = {
    "pyodide.asm.wasm": "pyodide.asm.wasm.gzip",
    **{name: name for name in ("pyodide.mjs", "pyodide.asm.mjs", "python_stdlib.zip", "pyodide-lock.json")},
}

# folder: (npm package, version, licence, where, {member of the package: name in the folder}); `*` takes a whole folder,
# and a name that ends in .gzip packs the file
PACKAGES = {
    "mathjax": (
        "mathjax",
        "3.2.2",
        "Apache-2.0",
        SITE,
        {
            "es5/startup.js": MATHJAX,
            "es5/output/chtml/fonts/woff-v2/*": "output/chtml/fonts/woff-v2/",
            **{f"es5/input/tex/extensions/{n}.js": f"input/tex/extensions/{n}.js" for n in MATHJAX_EXTENSIONS},
            "LICENSE": "LICENSE",
        },
    ),
    "pyodide": (
        "pyodide",
        "314.0.7",
        "MPL-2.0 AND PSF-2.0",
        SITE,
        PYODIDE,
    ),
    "axe-core": ("axe-core", "4.14.1", "MPL-2.0", TESTS, {"axe.min.js": "axe.min.js", "LICENSE": "LICENSE"}),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the manifest, by POSIX path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def check(folder: Path) -> list[str]:
    """What differs between `folder` and its manifest; an empty list when nothing does."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    expected = {f"{name}/{path}": digest for name, p in manifest.items() for path, digest in p["files"].items()}
    found = listed(folder)
    problems = [f"{path} is in {folder.name} but not in its manifest" for path in sorted(found.keys() - expected)]
    problems += [f"{path} is missing" for path in sorted(expected.keys() - found)]
    both = sorted(expected.keys() & found)
    return problems + [f"{path} differs from the manifest" for path in both if found[path] != expected[path]]


def renew(name: str, work: Path) -> dict:
    """Copy one package's files to their folder and return its entry of the manifest."""
    package, version, licence, where, members = PACKAGES[name]
    packed = work / name
    packed.mkdir()
    command = ["npm", "pack", "--silent", f"{package}@{version}"]
    subprocess.run(command, cwd=packed, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(packed.glob("*.tgz"))) as archive:
        archive.extractall(packed, filter="data")
    target = where / name
    kept = target / "LICENSE"  # written by hand where the npm package brings no licence text
    licence_text = kept.read_text(encoding="utf-8") if kept.exists() else None
    shutil.rmtree(target, ignore_errors=True)
    for member, local in members.items():
        for source in sorted((packed / "package").glob(member)):
            destination = target / local / source.name if "*" in member else target / local
            destination.parent.mkdir(parents=True, exist_ok=True)
            if local.endswith(".gzip"):
                destination.write_bytes(gzip.compress(source.read_bytes(), mtime=0))
            else:
                shutil.copyfile(source, destination)
    if name == "mathjax":
        join_mathjax(packed / "package" / "es5", target / MATHJAX)
    if not kept.exists():
        if licence_text is None:
            raise SystemExit(f"{package} brings no licence text: write it to {kept.relative_to(ROOT)}, then run this")
        kept.write_text(licence_text, encoding="utf-8")
    return {"package": package, "version": version, "licence": licence, "files": listed(target)}


def join_mathjax(folder: Path, bundle: Path) -> None:
    """Write MathJax' start and the components of `MATHJAX_PARTS` into one file."""
    names = ", ".join(f'"{name}"' for name in MATHJAX_PARTS)
    texts = [(folder / f"{name}.js").read_text(encoding="utf-8") for name in ("startup", *MATHJAX_PARTS)]
    texts.insert(1, f"MathJax.loader.preLoad({names});")
    bundle.write_text("".join(f"{text.rstrip()}\n" for text in texts), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the files with the manifest and change nothing")
    if parser.parse_args().check:
        problems = [problem for folder in (SITE, TESTS) for problem in check(folder)]
        print("\n".join(problems) or "the vendored files are those of the manifest")
        return 1 if problems else 0
    with tempfile.TemporaryDirectory() as work:
        for folder in (SITE, TESTS):
            names = [name for name, package in PACKAGES.items() if package[3] == folder]
            manifest = {name: renew(name, Path(work)) for name in names}
            text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            (folder / "manifest.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
