#!/usr/bin/env bash
# Install a CUDA build of torch into a folder of its own, for the tests under emulated CUDA. No GPU is needed.
#
#     bash scripts/setup_cuda.sh FOLDER
#     export K2TRAIN_CUDA_PYTHON=FOLDER/bin/python
#
# About 5.4 GB, and some minutes. The version is the one that the emulation was tried with; what else k2train needs
# comes from pyproject.toml. PYTHON=... names the interpreter, else the first of python3.11, python3.12, python3.13.
set -euo pipefail

VERSION=2.14.1
NEEDED_GB=12 # the wheels, unpacked and packed

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

die() {
    printf 'setup_cuda: %s\n' "$*" >&2
    exit 1
}

[ "$#" -eq 1 ] || die "name the folder to install into: bash scripts/setup_cuda.sh FOLDER"
[ "$(uname -sm)" = "Linux x86_64" ] || die "torch has CUDA builds for Linux on x86_64; this is $(uname -sm)"
command -v gcc >/dev/null 2>&1 || die "the emulated runtime is compiled by gcc, which is missing"

python="${PYTHON:-}"
for name in python3.11 python3.12 python3.13; do
    if [ -z "$python" ] && "$name" -c '' >/dev/null 2>&1; then python="$name"; fi
done
[ -n "$python" ] || die "no Python 3.11, 3.12 or 3.13 found; name one: PYTHON=/path/to/python"

folder="$1"
mkdir -p "$folder"
free_gb="$(($(df --output=avail -k "$folder" | tail -n 1) / 1000000))"
[ "$free_gb" -ge "$NEEDED_GB" ] || die "needs $NEEDED_GB GB of disk in $folder, $free_gb GB are free"

"$python" -m venv "$folder" || die "$python cannot make a virtual environment in $folder"
"$folder/bin/python" - "$root/pyproject.toml" >"$folder/requirements.txt" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    for line in tomllib.load(file)["project"]["dependencies"]:
        if not line.startswith("torch"):
            print(line)
PYTHON
began=$SECONDS
"$folder/bin/python" -m pip install --disable-pip-version-check "torch==$VERSION" -r "$folder/requirements.txt" ||
    die "pip could not install torch $VERSION"
built_for="$("$folder/bin/python" -c 'import torch; print(torch.version.cuda)')"
[ "${built_for%%.*}" = 13 ] || die "torch $VERSION is not built for CUDA 13 but for $built_for"
echo "setup_cuda: torch $VERSION for CUDA $built_for, $(du -sm "$folder" | cut -f 1) MB in $((SECONDS - began)) s"
