#!/bin/sh
# Make .venv and install everything into it; called by the Makefile, which skips it when nothing has changed.
# usage: setup.sh EXTRA       (an extra of pyproject.toml: test, or lab)
# PYTHON names an interpreter; without it the first one on the path that is new enough is taken.
# Every failure ends in one line that says what to do; pip's own output is in .venv/install.log.
set -u
extra=$1
venv=.venv
log=$venv/install.log

fail() {
    echo "setup: $*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || echo "none"
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "needs Python 3.11 or newer, but PYTHON=$PYTHON is $(version "$PYTHON")"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, found $(version python3); install one, or name one: make PYTHON=/path/to/python3.12"
}

# free space in MB where the checkout lies; a full environment takes about 2 GB, and 7 GB with CUDA builds of torch
enough_space() {
    free=$(df -Pk . 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')
    [ -z "$free" ] || [ "$free" -ge "$1" ] || fail "the disk is nearly full: $free MB free here, at least $1 MB needed"
}

explain() {
    if grep -qi "no space left\|disk quota exceeded" "$log"; then
        fail "the disk is full (see $log)"
    elif grep -qi "failed to establish a new connection\|name resolution\|name or service not known\|connection refused\|network is unreachable\|proxyerror\|timed out\|max retries exceeded\|connection broken\|ConnectionResetError" "$log"; then
        fail "no network: pip could not reach the package index (see $log)"
    else
        fail "pip failed: $(grep -i '^error' "$log" | head -n 1) (see $log)"
    fi
}

install() {
    # --no-build-isolation: the pinned setuptools builds the package, and nothing else is fetched for it
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --retries 2 -c constraints.txt "$@" \
        >>"$log" 2>&1 || explain
}

# Compile what was installed on all cores: pip would take one, and most of its time. The packages' own tests are left
# out, because nobody imports them. A file for another version of Python does not compile, which is no failure.
compile() {
    "$venv/bin/python" -m compileall -qq -j 0 -x '/tests?/|/torch/testing/_internal/' "$venv/lib" >>"$log" 2>&1 || true
}

if [ -e "$venv" ] && ! new_enough "$venv/bin/python"; then
    echo "setup: $venv is not usable here, making it anew"
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    python=$(find_python) || exit 1
    enough_space 2500
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$python has no venv module; on Debian or Ubuntu: apt install python$(version "$python" | cut -d. -f1,2)-venv"
    echo "setup: making $venv with Python $(version "$python")"
    if ! message=$("$python" -m venv "$venv" 2>&1); then
        rm -rf "$venv"
        case $message in
            *"No space left"*) fail "the disk is full" ;;
            *) fail "$python -m venv failed: $(echo "$message" | tail -n 1)" ;;
        esac
    fi
fi

: >"$log" || fail "cannot write $log"
echo "setup: installing peftlab[$extra] and what it needs (a few minutes the first time; progress in $log)"
install --upgrade pip setuptools wheel
install --no-build-isolation --no-compile -e ".[$extra]"
compile
