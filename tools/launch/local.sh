#!/bin/bash
# Train in several processes on this machine, each with one CPU device: the way to try what a cluster will do.
#   tools/launch/local.sh 2 configs/swin_digits.py --smoke --set mesh.data=1 --set mesh.tensor=1
# The first argument is the number of processes, the others go to `python -m train` as they are. Process 0 speaks here,
# the others into a file each. Ctrl-C stops all of them at one step, saved; the same command resumes.

set -u

if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    echo "usage: tools/launch/local.sh PROCESSES CONFIG [OPTION ...]" >&2
    exit 2
fi
count=$1
shift

python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
logs=$(mktemp -d "${TMPDIR:-/tmp}/jaxlayers-processes-XXXXXX")
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
for ((rank = 0; rank < count; rank++)); do
    flags=(--devices 1 --coordinator "127.0.0.1:$port" --num-processes "$count" --process-id "$rank")
    if [ "$rank" -eq 0 ]; then
        "$python" -u -m train "$@" "${flags[@]}" &
    else
        "$python" -u -m train "$@" "${flags[@]}" >"$logs/process-$rank.log" 2>&1 &
    fi
    pids+=($!)
done
[ "$count" -gt 1 ] && echo "the other processes write to $logs/"

# Ctrl-C in a terminal reaches the processes too, and a second one would kill them unsaved; SIGTERM may come twice.
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1

code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal ended the waiting, not the process
        wait "$pid"
        status=$?
    done
    [ "$status" -gt "$code" ] && code=$status
done
exit "$code"
