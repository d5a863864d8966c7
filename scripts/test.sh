#!/usr/bin/env bash
# Set up if needed, then ruff, mypy and pytest; with arguments pytest alone, with these: bash scripts/test.sh -m "not slow".
#
# pytest comes last, so that its summary is the last line. A check that fails ends it there: its message is then last.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
bash scripts/setup.sh dev
python=.venv/bin/python

check() {
    local name="$1" code=0
    shift
    "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        printf 'test: %s failed (exit code %s)\n' "$name" "$code" >&2
        exit "$code"
    fi
}

if [ "$#" -eq 0 ]; then
    check "ruff check" "$python" -m ruff check k2train tools tests
    check "ruff format" "$python" -m ruff format --check --quiet k2train tools tests
    check "mypy" "$python" -m mypy
fi
exec "$python" -m pytest -q "$@"
