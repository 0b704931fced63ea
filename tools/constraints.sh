#!/bin/sh
# Renew constraints.txt: install everything into a fresh environment with today's releases, and write down what came.
# Four things are held by hand. torch stays as it is pinned: change its line in constraints.txt first if you want another.
# soupsieve stays at 2.x, because 3 refuses the Python 3.11.2 of Debian 12. pytest stays below 9.2, under which
# pytest-xdist 3.8 no longer keeps the tests of a file on one worker. Local builds of torch lose the mark +cpu.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/python -m pip --quiet --disable-pip-version-check"
echo "constraints: installing the newest of everything into a fresh environment"
$pip install --upgrade pip setuptools wheel
$pip install -e ".[test,lab]" "$(grep '^torch==' constraints.txt)" "soupsieve<3" "pytest<9.2"
{
    sed '/^[^#]/,$d' constraints.txt
    $pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$//' | grep -v '^peftlab' |
        "$work/venv/bin/python" -c 'import sys; print(*sorted(sys.stdin.read().split(), key=str.lower), sep="\n")'
} >"$work/constraints.txt"
mv "$work/constraints.txt" constraints.txt
"$work/venv/bin/python" - <<'PY'
import json, pathlib
pins = dict(line.split("==") for line in pathlib.Path("constraints.txt").read_text().split() if "==" in line)
file = pathlib.Path("peftlab/tested.json")
tested = json.loads(file.read_text())
tested["pinned"] = {name: pins.get(name, version) for name, version in tested["pinned"].items()}
file.write_text(json.dumps(tested, indent=1) + "\n")
PY
echo "constraints: written, and noted in peftlab/tested.json; now make test"
