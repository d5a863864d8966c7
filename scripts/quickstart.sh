#!/usr/bin/env bash
# From a fresh clone to a trained model: set up, prepare real text, train both stages on 4 processes, show the result,
# and what the model says.
#
#     bash scripts/quickstart.sh [dotted.key=value ...]      arguments go to both trainings
#
# Each part detects what is already done, so the same command continues an interrupted quickstart. A finished one prints
# the result again.
# Exit codes: 0 done; 75 stopped on request after saving, run it again; else that of the part that failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
python=.venv/bin/python
self=quickstart
given="${*:+ $*}"
for argument in "$@"; do
    case "$argument" in
    run.directory=* | run.name=* | run.init_from=* | data.manifest=*)
        printf 'quickstart: %s: both stages take the arguments, and stage 2 looks for stage 1 under its own name; leave it out\n' "${argument%%=*}" >&2
        exit 2 ;;
    esac
done

# Four processes on one laptop: one thread each.
export OMP_NUM_THREADS=1

. scripts/parts.sh

train() {
    # exec: a signal to this part reaches the launcher, and no shell in between.
    exec "$python" -m k2train.launch --standalone --local-addr 127.0.0.1 --nproc-per-node 4 \
        -m k2train.train "$@" parallel.tensor=2 parallel.pipeline=2
}

say() {
    exec "$python" tools/generate.py "$1" --prompt "def read(self, " --prompt "Return the " \
        --temperature 0.7 --top-p 0.9 --max-tokens 48
}

part "set up" bash scripts/setup.sh data
part "prepare the text of stage 1" "$python" tools/prepare_data.py configs/demo/data_stage1.yaml
part "prepare the text of stage 2" "$python" tools/prepare_data.py configs/demo/data_stage2.yaml
part "train stage 1" train configs/demo/stage1.yaml "$@"
part "train stage 2" train configs/demo/stage2.yaml "$@"
part "show the result" "$python" tools/show_run.py runs/demo-stage1 runs/demo-stage2
part "write the report of stage 1" "$python" tools/report.py runs/demo-stage1
part "write the report of stage 2" "$python" tools/report.py runs/demo-stage2
part "what the model says before training" say runs/demo-stage1/checkpoints/ckpt_000
part "what it says after training" say runs/demo-stage2

table_of_parts

# The tour goes on by itself, and says at its own end what to do next.
if [ "${K2TRAIN_PART_OF:-}" = tour ]; then exit 0; fi

# Every command below works right after a quickstart; the run on one process gets the same arguments.
quoted=""
if [ "$#" -gt 0 ]; then quoted="$(printf ' %q' "$@")"; fi
printf '\n== what to do next\n'
cat <<NEXT
source .venv/bin/activate
# curves, chunks, time and events of a run on one page: open runs/demo-stage1/report.html in a browser
# the documents that one training step was made of
python tools/inspect_data.py --run runs/demo-stage1 --step 5
# check every file of a run: ledger, metrics, checkpoints
python tools/verify_run.py runs/demo-stage2
# what the model says to a text of yours
python tools/generate.py runs/demo-stage2 --prompt "import " --temperature 0.7 --top-p 0.9
# train on one process and stop after 5 steps; the same command resumes
python -m k2train.train configs/demo/stage1.yaml run.name=alone run.stop_after_steps=5$quoted
# compare that run with the one on 4 processes
python tools/compare_runs.py runs/demo-stage1 runs/alone
# from your own text to your own model: docs/quickstart.md
NEXT
