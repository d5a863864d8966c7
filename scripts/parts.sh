#!/usr/bin/env bash
# The parts of a script, one after another: sourced by quickstart.sh and tour.sh.
#
# Wants `self` (the script's name, without .sh) and `given` (its arguments, for the line that says how to go on).
# The alternative refused is a copy in each: signals and exit codes are where scripts go wrong.
set -euo pipefail

begin=$SECONDS
parts=()
child=""
signals=0
last=0
# 1 while a part may fail and the rest goes on.
may_fail=0

# Each part gets its own process group, so that Ctrl-C and kill reach it only from here, once, and all its processes.
set -m
on_signal() {
    signals=$((signals + 1))
    if [ "$signals" -eq 1 ] && [ -n "$child" ]; then
        printf '%s: asked to stop; a training finishes its step and saves\n' "$self" >&2
        kill -TERM -- "-$child" 2>/dev/null || true
    fi
}
trap on_signal INT TERM HUP

# part NAME COMMAND...: run the command, record its time, and end everything with one line if it fails.
part() {
    local name="$1" began=$SECONDS code=127 seen now
    shift
    if [ "$signals" -gt 0 ]; then stopped "before" "$name"; fi
    printf '\n== %s\n' "$name"
    "$@" &
    child=$!
    # A trapped signal ends the wait, not the part, which may be saving: wait again. 127: it has ended already.
    while :; do
        seen=$signals now=0
        wait "$child" || now=$?
        if [ "$now" -ne 127 ]; then code=$now; fi
        if [ "$signals" -eq "$seen" ]; then break; fi
    done
    child=""
    last=$code
    parts+=("$(printf '%5d s  %s' $((SECONDS - began)) "$name")")
    if [ "$code" -eq 75 ] || { [ "$code" -ne 0 ] && [ "$signals" -gt 0 ]; }; then stopped "in" "$name"; fi
    if [ "$code" -ne 0 ] && [ "$may_fail" -eq 0 ]; then
        printf '%s: "%s" failed (exit code %s); its message is above\n' "$self" "$name" "$code" >&2
        exit "$code"
    fi
}

stopped() {
    printf '%s: stopped %s "%s"; to go on: bash scripts/%s.sh%s\n' "$self" "$1" "$2" "$self" "$given" >&2
    exit 75
}

table_of_parts() {
    printf '\n== done\n'
    printf '%s\n' "${parts[@]}"
    printf '%5d s  in all\n' $((SECONDS - begin))
}
