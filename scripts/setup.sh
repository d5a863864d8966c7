#!/usr/bin/env bash
# Make .venv and install k2train in it: bash scripts/setup.sh [EXTRA ...], extras as pyproject.toml names them.
#
# What was installed is stamped, last of all, with a hash of everything it was decided from, so that a second run does
# nothing and one after a kill does the rest. The alternative refused is to call pip every time: it takes seconds and
# wants the registry. PYTHON=... names the interpreter that makes .venv; without it the newest-known-good is looked for.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
extras=("$@")
python=.venv/bin/python

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or newer; name another interpreter"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3.11 python3.12 python3.13 python3 python; do
        if new_enough "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    die "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python bash scripts/setup.sh"
}

# All on one line: the hash, then the extras asked for with those they include ("-" stands for none).
describe() {
    "$python" - "$root" "$constraints" "${extras[@]:--}" <<'PYTHON'
import hashlib, pathlib, re, sys, tomllib

root, constraints, *asked = sys.argv[1:]
text = pathlib.Path("pyproject.toml").read_bytes()
project = tomllib.loads(text.decode())["project"]
text += pathlib.Path("setup.py").read_bytes()
extras = project.get("optional-dependencies", {})
unknown = [name for name in asked if name != "-" and name not in extras]
if unknown:
    sys.exit(f"setup: no such extra: {', '.join(unknown)}; there are: {', '.join(extras)}")
found = ["-"]
while asked:
    name = asked.pop()
    if name not in found:
        found.append(name)
        for line in extras[name]:
            own = re.match(rf"{project['name']}\[([^]]*)\]", line)
            asked += [part.strip() for part in own[1].split(",")] if own else []
digest = hashlib.sha256("\0".join([root, sys.version, constraints]).encode() + text)
if constraints:
    digest.update(pathlib.Path(constraints).read_bytes())
print(digest.hexdigest(), *sorted(found))
PYTHON
}

is_installed() {
    local name
    for name in "${names[@]}"; do
        [ "$(cat ".venv/k2train-installed/$name" 2>/dev/null)" = "$hash" ] || return 1
    done
}

# Two scripts started at once must not install into one folder; the lock goes with the process.
exec 9<"scripts/setup.sh"
if command -v flock >/dev/null 2>&1; then flock 9; fi

constraints=constraints/cpu.txt
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then constraints=""; fi

if ! "$python" -c 'import pip' >/dev/null 2>&1; then
    maker="$(find_python)"
    echo "setup: making .venv with $("$maker" --version 2>&1) ($maker)"
    "$maker" -m venv --clear .venv 9<&- >/dev/null 2>&1 ||
        die "$maker cannot make .venv; its venv module may be missing (on Debian and Ubuntu: package python3-venv)"
elif ! new_enough "$python"; then
    die ".venv holds a Python older than 3.11; remove the folder .venv and start again"
fi

described="$(describe)" || exit 1
read -r -a names <<<"$described"
hash="${names[0]}"
names=("${names[@]:1}")
if is_installed; then exit 0; fi

wanted="$(IFS=,; printf '%s' "${extras[*]:-}")"
target=".${wanted:+[$wanted]}"
echo "setup: installing $target${constraints:+ with $constraints (no CUDA device)}; takes a minute or more, log in .venv/setup.log"
began=$SECONDS
if ! "$python" -m pip install --disable-pip-version-check ${constraints:+-c "$constraints"} -e "$target" 9<&- >.venv/setup.log 2>&1; then
    tail -n 8 .venv/setup.log >&2
    die "pip could not install $target; the whole log is in $root/.venv/setup.log"
fi
mkdir -p .venv/k2train-installed
for name in "${names[@]}"; do
    printf '%s\n' "$hash" >".venv/k2train-installed/$name.new"
    mv ".venv/k2train-installed/$name.new" ".venv/k2train-installed/$name"
done
echo "setup: done in $((SECONDS - began)) s"
