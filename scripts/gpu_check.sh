#!/usr/bin/env bash
# Check one GPU, from a bare checkout, with any Python that has a CUDA torch:
#
#     bash scripts/gpu_check.sh [--minutes 8] [--only PART ...] [--folder DIR] [--dry-run] [--list]
#
# PY=/path/to/python3 names the interpreter; without it .venv/bin/python, else python3. What it lacks is named before
# anything starts; scripts/gpu_site.sh makes a folder with it, .gpu_site, to take along where no package registry is.
# Exit codes: 0 every part ran and held; 1 a part failed or did not run; 2 a usage error, a missing package, or no device.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

python="${PY:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi
if ! command -v "$python" >/dev/null 2>&1; then
    printf 'gpu_check: %s cannot be run; name a Python that has torch: PY=/path/to/python3\n' "$python" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    printf 'gpu_check: %s is no Python 3.11 or newer; name another: PY=/path/to/python3\n' "$python" >&2
    exit 2
fi

# First in the path: a package there is meant, even where the interpreter has an older one.
if [ -d "$root/.gpu_site" ]; then export PYTHONPATH="$root/.gpu_site${PYTHONPATH:+:$PYTHONPATH}"; fi
exec "$python" tools/gpu_check.py "$@"
