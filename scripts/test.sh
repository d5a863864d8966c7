#!/usr/bin/env bash
# Set up if needed, then check and test:
#
#     bash scripts/test.sh                          ruff, mypy and the quick tests
#     bash scripts/test.sh --all                    ruff, mypy and every test, as continuous integration runs them
#     bash scripts/test.sh [--all] --durations      also where the time goes: by test, by file and by mechanism
#     bash scripts/test.sh tests/plan -k bubble     pytest alone, with these arguments
#
# Three workers share the tests (K2TRAIN_TEST_WORKERS=N for another number): of two processors one would idle while a
# test waits. Many tests start processes of their own.
# mypy runs beside them. pytest's summary is the last line, unless a check has failed: then its message is.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

all=false
durations=()
arguments=()
for argument in "$@"; do
    case "$argument" in
    --all) all=true ;;
    --durations) durations=(--durations=25) ;;
    *) arguments+=("$argument") ;;
    esac
done

# Continuous integration runs the Triton kernels in an interpreter, which is 290 MB to load and 1 GB to hold.
extras=(dev)
if [ "$all" = true ]; then extras+=(triton); fi
bash scripts/setup.sh "${extras[@]}"
python=.venv/bin/python
if [ "${#arguments[@]}" -gt 0 ]; then
    exec "$python" -m pytest -q "${durations[@]}" "${arguments[@]}"
fi

failed() {
    printf 'test: %s failed (exit code %s)\n' "$1" "$2" >&2
    exit "$2"
}

"$python" -m ruff check k2train tools tests || failed "ruff check" "$?"
"$python" -m ruff format --check --quiet k2train tools tests || failed "ruff format" "$?"

types_log="$(mktemp)"
"$python" -m mypy >"$types_log" 2>&1 &
types=$!
trap 'kill "$types" 2>/dev/null || true; rm -f "$types_log"' EXIT

chosen=()
if [ "$all" = false ]; then chosen=(-m "not slow"); fi
code=0
"$python" -m pytest -q -n "${K2TRAIN_TEST_WORKERS:-3}" "${durations[@]}" "${chosen[@]}" || code=$?

types_code=0
wait "$types" || types_code=$?
if [ "$types_code" -ne 0 ]; then
    cat "$types_log" >&2
    failed "mypy" "$types_code"
fi
exit "$code"
