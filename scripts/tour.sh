#!/usr/bin/env bash
# From text to a released, evaluated, chatting demo: the quickstart, then evaluation, contamination, galleries, chat,
# a release with an index of everything, and its verification.
#
#     bash scripts/tour.sh [dotted.key=value ...]      arguments go to all three trainings
#
# Each part detects what is already done, so the same command continues an interrupted tour, and takes up a quickstart.
# A part whose packages are not installed is left out, and said. The demo is released into release/demo.
# Exit codes: 0 done, parts may be left out; 75 stopped on request after saving, run it again; else that of the part
# that failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
python=.venv/bin/python
self=tour
given="${*:+ $*}"
out=release/demo
left_out=()
. scripts/parts.sh

# optional NAME TOOL PACKAGE COMMAND...: a part that is left out where the tool or the package is missing; "-" for none.
optional() {
    local name="$1" tool="$2" package="$3"
    shift 3
    if [ ! -f "$tool" ]; then
        left_out+=("$name: there is no $tool")
    elif [ "$package" != - ] && ! has "$package"; then
        left_out+=("$name: the package $package is not installed")
    else
        part "$name" "$@"
        return
    fi
    printf '\n== %s\nleft out: %s\n' "$name" "${left_out[-1]#*: }"
}

has() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

quickstart() {
    # exec: a signal to this part reaches the quickstart, which passes it on.
    export K2TRAIN_PART_OF=tour
    exec bash scripts/quickstart.sh "$@"
}

# A model this small is no work for two threads: they would wait for each other most of the time.
one_thread() {
    exec env OMP_NUM_THREADS=1 "$python" "$@"
}

chat_data() {
    exec "$python" tools/prepare_chat.py stdlib --to data/demo/chat --tokenizer runs/demo-stage2 \
        --sequence-length 512 --epochs 2 --chunks 2 --held-out 16
}

talk() {
    printf 'What is shutil.copytree for?\n'
    one_thread tools/chat.py runs/demo-chat --system "You answer questions about Python." \
        --message "What is shutil.copytree for?"
}

release_demo() {
    local options=(--every 4 --chunks)
    has transformers || options+=(--no-check)
    if [ -d "$out" ]; then
        printf '%s is there already; remove it to release again\n' "$out"
        return
    fi
    mkdir -p "$(dirname "$out")"
    exec "$python" tools/release.py runs/demo-stage1 runs/demo-stage2 runs/demo-chat --out "$out" "${options[@]}"
}

part "the quickstart" quickstart "$@"

# What evaluation and checks of an export need. Without a registry the tour goes on with what is there.
may_fail=1
part "install what an evaluation needs" bash scripts/setup.sh data eval
may_fail=0
if [ "$last" -ne 0 ]; then left_out+=("install what an evaluation needs: it failed, its message is above"); fi

optional "evaluate the checkpoints" tools/evaluate.py lm_eval \
    one_thread tools/evaluate.py runs/demo-stage1 --tasks demo --checkpoints all --limit 40
optional "index the training data" tools/trace.py - "$python" tools/trace.py index runs/demo-stage1
if [ -d runs/demo-stage1/evaluation ]; then
    optional "look for test items in the data" tools/contamination.py - \
        "$python" tools/contamination.py runs/demo-stage1 --tasks all
else
    left_out+=("look for test items in the data: nothing was evaluated")
fi
optional "galleries" tools/gallery.py - \
    one_thread tools/gallery.py runs/demo-stage1 --prompt "def read(self, " --prompt "Return the " --max-tokens 40
part "write the report again, with the scores" "$python" tools/report.py runs/demo-stage1
part "prepare conversations" chat_data
part "train on them" "$python" -m k2train.train configs/demo/chat.yaml "$@"
part "release all of it" release_demo
part "verify the release" "$python" tools/verify_release.py "$out"
part "talk with the demo" talk

table_of_parts
if [ "${#left_out[@]}" -gt 0 ]; then
    printf '\n== left out\n'
    printf '%s\n' "${left_out[@]}"
fi

printf '\n== what to do next\n'
cat <<NEXT
source .venv/bin/activate
# curves, scores and events of a run on one page: open runs/demo-stage1/report.html in a browser
# what each checkpoint says, and each item of the evaluation: open runs/demo-stage1/gallery/pages/index.html
# talk on; Ctrl-D ends it
python tools/chat.py runs/demo-chat --system "You answer questions about Python."
# the release: open release/demo/README.md and release/demo/INDEX.md; check it with a stock tool, too
(cd release/demo && sha256sum --quiet --check SHA256SUMS)
# what else is there for you: docs/research_suite.md, docs/pretraining_suite.md, docs/developer_suite.md
NEXT
