#!/usr/bin/env bash
# Install optional GPU kernels into the environment that has torch, one package after another, and check each:
#
#     bash scripts/install_gpu.sh [--dry-run] [--jobs N] [PACKAGE ...]
#
# PACKAGE: flash_attn_2, flash_attn_3, flash_attn_4, transformer_engine, apex; left out: all that the device here can use.
# A package comes as a wheel where its makers offer one for this torch and CUDA; the rest is built here, which takes from
# minutes to an hour, --jobs compilers at a time (default: a half of the cores, at most 1 for each 4 GB of memory).
# torch is never replaced. After each installation its kernels compute one forward and backward, compared with written-out
# references. Nothing needs any of these packages: kernels that are not there are not taken by auto.
# --dry-run prints the commands and installs nothing; it needs no device. PY=/path/to/python3 names the interpreter.
# Exit codes: 0 all are there and right; 1 one could not be installed or is wrong, the others were tried; 2 a usage error, or
# something that is missing here.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
every=(flash_attn_2 flash_attn_3 flash_attn_4 transformer_engine apex)
check="$root/tools/gpu_checks/installed_kernel.py"

refuse() {
    printf 'install_gpu: %s\n' "$*" >&2
    exit 2
}

dry=false
jobs=""
packages=()
while [ "$#" -gt 0 ]; do
    case "$1" in
    --dry-run) dry=true ;;
    --jobs)
        jobs="${2:-}"
        [[ "$jobs" =~ ^[1-9][0-9]*$ ]] || refuse "--jobs must be a whole number of at least 1, not '$jobs'"
        shift
        ;;
    -h | --help)
        sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    -*) refuse "unknown option $1; see --help" ;;
    *)
        [[ " ${every[*]} " == *" $1 "* ]] || refuse "no such package: $1; there are: ${every[*]}"
        packages+=("$1")
        ;;
    esac
    shift
done

python="${PY:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi
command -v "$python" >/dev/null 2>&1 || refuse "$python cannot be run; name a Python that has torch: PY=/path/to/python3"

facts="$("$python" -c 'import torch; print(torch.__version__, (torch.version.cuda or "none").split(".")[0])' 2>/dev/null)" ||
    refuse "$python has no torch; install it first (bash scripts/setup.sh), or name another: PY=/path/to/python3"
read -r torch cuda <<<"$facts"

if [ "$dry" = true ]; then
    if [ "$cuda" = none ]; then cuda=13; fi
else
    [ "$cuda" != none ] || refuse "torch $torch is a CPU build; these kernels need one for CUDA"
    usable="$("$python" "$check" --list)" || refuse "no CUDA device is seen here; --dry-run prints the commands"
    if [ "${#packages[@]}" -eq 0 ]; then mapfile -t packages <<<"$usable"; fi
    command -v nvcc >/dev/null 2>&1 || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
        refuse "there is no nvcc: install the CUDA $cuda toolkit, or set CUDA_HOME"
    nvcc="$(command -v nvcc || printf '%s' "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")"
    found="$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')"
    [ "$found" = "$cuda" ] || refuse "nvcc is of CUDA $found, torch $torch of CUDA $cuda; install that toolkit, or set CUDA_HOME"
fi
if [ "${#packages[@]}" -eq 0 ]; then packages=("${every[@]}"); fi
if [ -z "$jobs" ]; then
    by_cores=$(($(nproc) / 2))
    by_memory=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 4000000))
    jobs=$((by_cores < by_memory ? by_cores : by_memory))
    jobs=$((jobs > 1 ? jobs : 1))
fi
build=("MAX_JOBS=$jobs")

# Names torch at its version, so that no package brings another one along.
if [ "$dry" = true ]; then
    # What is printed can be run, so it makes this file itself.
    pinned=torch.txt
    pin="+ echo torch==$torch >$pinned"
else
    pinned="$(mktemp)"
    trap 'rm -f "$pinned"' EXIT
    printf 'torch==%s\n' "$torch" >"$pinned"
    pin=""
fi

run() {
    if [ "$dry" = true ]; then
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

install() {
    run env "${build[@]}" "$python" -m pip install --disable-pip-version-check --no-build-isolation -c "$pinned" "$@"
}

install_package() {
    case "$1" in
    # Its build looks for a wheel of its makers first.
    flash_attn_2) install flash-attn ;;
    flash_attn_3) install "git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper" ;;
    flash_attn_4) install flash-attn-4 ;;
    # The library is a wheel for each CUDA; its part for torch is built.
    transformer_engine) install "transformer-engine[pytorch,core_cu$cuda]" ;;
    # Without these variables its build leaves the kernels out, without a word.
    apex)
        local build=("MAX_JOBS=$jobs" APEX_CPP_EXT=1 APEX_CUDA_EXT=1)
        install "git+https://github.com/NVIDIA/apex.git"
        ;;
    esac
}

echo "install_gpu: ${packages[*]} for torch $torch, CUDA $cuda, $jobs at a time${pin:+$'\n'$pin}"
install ninja packaging setuptools wheel || refuse "pip could not install what builds need"
failed=()
for package in "${packages[@]}"; do
    if install_package "$package" && run "$python" "$check" "$package"; then continue; fi
    printf 'install_gpu: %s is not usable; the others go on\n' "$package" >&2
    failed+=("$package")
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'install_gpu: not usable: %s; what pip and the checks said is above\n' "${failed[*]}" >&2
    exit 1
fi
if [ "$dry" = true ]; then
    echo "install_gpu: nothing was installed"
    exit 0
fi
echo "install_gpu: done; bash scripts/gpu_check.sh --only kernels compares every kernel in whole models"
