#!/usr/bin/env bash
# Make a folder of packages for a GPU machine that has torch and no package registry:
#
#     bash scripts/gpu_site.sh [--python 3.12] [--folder .gpu_site] [PACKAGE ...]
#
# --python: version of the interpreter there (default 3.12). Without PACKAGE: all that training imports but torch and numpy,
# which come with each other, at the versions of pyproject.toml. Copy the folder into the checkout there, and
# scripts/gpu_check.sh finds it. PY=/path/to/python3 names the interpreter here whose pip is used.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
refuse() { printf 'gpu_site: %s\n' "$*" >&2; exit 2; }

version=3.12
folder="$root/.gpu_site"
packages=()
while [ "$#" -gt 0 ]; do
    case "$1" in
    --python) version="${2:-}"; shift ;;
    --folder) folder="${2:-}"; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) refuse "unknown option $1; see --help" ;;
    *) packages+=("$1") ;;
    esac
    [ "$#" -eq 0 ] || shift
done
[[ "$version" =~ ^3\.[0-9]+$ ]] || refuse "--python must be a version such as 3.12, not '$version'"
[ -n "$folder" ] || refuse "--folder needs a folder"

# It is replaced as a whole, so it must be one of ours.
mark=.made_by_gpu_site
if [ -e "$folder" ] && [ "$folder" != "$root/.gpu_site" ] && [ ! -e "$folder/$mark" ] && [ -n "$(ls -A "$folder")" ]; then
    refuse "$folder is there and was not made by this script; name a new folder"
fi

python="${PY:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi
"$python" -m pip --version >/dev/null 2>&1 || refuse "$python has no pip; name a Python that has: PY=/path/to/python3"

if [ "${#packages[@]}" -eq 0 ]; then
    # Everything that runs without a compiler: pydantic brings what it needs.
    mapfile -t packages < <("$python" - "$root/pyproject.toml" <<'PYTHON'
import re, sys, tomllib

for line in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    if re.match(r"[\w.-]+", line)[0] in ("pydantic", "pyyaml", "xxhash"):
        print(line)
PYTHON
    )
fi

# A new folder takes the old one's place at the end: packages of two versions must not mix.
fresh="$(mktemp -d "$(dirname "$folder")/gpu_site.XXXXXX")"
trap 'rm -rf "$fresh"' EXIT
machine="$(uname -m)"
"$python" -m pip install --disable-pip-version-check --quiet --no-compile --target "$fresh" --only-binary=:all: --implementation cp \
    --python-version "$version" --platform "manylinux2014_$machine" --platform "manylinux_2_17_$machine" \
    --platform "manylinux_2_28_$machine" --platform any "${packages[@]}" ||
    { printf 'gpu_site: pip could not get %s for Python %s\n' "${packages[*]}" "$version" >&2; exit 1; }
chmod 755 "$fresh"
touch "$fresh/$mark"
rm -rf "$folder"
mv "$fresh" "$folder"
trap - EXIT
printf 'gpu_site: %s holds %s for Python %s (%s); copy it into the checkout there\n' "$folder" "${packages[*]}" "$version" \
    "$(du -sh "$folder" | cut -f 1)"
