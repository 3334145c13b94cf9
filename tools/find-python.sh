#!/bin/sh
# Prints the Python that `.venv` is made with, or one sentence that says why there is none.
# It is $PYTHON if that is set, else .venv's own, else the first suitable one on PATH.
# Each candidate is run before it is chosen: a pyenv shim on PATH may only print an error.
set -eu

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if fits "$PYTHON"; then
        echo "$PYTHON"
        exit
    fi
    echo "set-up: PYTHON=$PYTHON cannot be used: it must run, be 3.11, 3.12 or 3.13, and have the modules venv and" \
        "ensurepip (on Debian and Ubuntu: the package python3-venv)." >&2
    exit 1
fi

for python in .venv/bin/python python3.11 python3.12 python3.13 python3; do
    if fits "$python"; then
        echo "$python"
        exit
    fi
done
echo "set-up: no Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip was found: install one (on Debian and" \
    "Ubuntu: python3 and python3-venv), or name one with \`make PYTHON=/path/to/python3.11 ...\`." >&2
exit 1
