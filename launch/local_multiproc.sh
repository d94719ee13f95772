#!/usr/bin/env bash
# Starts N processes on this machine: launch/local_multiproc.sh N CONFIG.py [--field value ...]
#
# Each process gets one GPU. With JAX_PLATFORMS=cpu all share the CPU, to try a run of several processes.
# SIGTERM and Ctrl-C are passed on to all. When one process fails, the others end by themselves; those that do
# not get SIGTERM after 5 seconds and SIGKILL after 10. The same command resumes.
#
# Environment variables:
#   PORT                   port of process 0 (default: a free one)
#   CUDA_VISIBLE_DEVICES   the GPUs to use, separated by commas (default: 0 to N-1)
#   and those of launch/_env.sh
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N CONFIG.py [--field value ...], N processes" >&2
  exit 2
fi
count=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${PORT:-} ]]; then
  coproc port_holder { exec "${PYTHON:-python}" "$here/_hold_port.py"; }
  read -r PORT <&"${port_holder[0]}"
fi
export COORDINATOR_ADDRESS="localhost:$PORT" NUM_PROCESSES=$count
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
if ((${#gpus[@]} < count)); then
  echo "CUDA_VISIBLE_DEVICES names ${#gpus[@]} GPU(s) for $count processes; name at least $count" >&2
  exit 2
fi

pids=()
stopping=0
signal_all() { ((${#pids[@]} == 0)) || kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
# A shell makes its background processes ignore SIGINT, so Ctrl-C is passed on as SIGTERM, which also saves.
trap 'stopping=1; signal_all TERM' TERM INT
for ((index = 0; index < count && stopping == 0; index++)); do
  PROCESS_ID=$index CUDA_VISIBLE_DEVICES=${gpus[index]} "$here/_env.sh" train "$@" &
  pids+=($!)
done

# A signal interrupts `wait` with a code above 128 while the process still runs: then wait for it again.
code=0
while ((${#pids[@]} > 0)); do
  result=0
  wait -n -p ended "${pids[@]}" || result=$?
  [[ -n ${ended:-} ]] || continue
  living=()
  for pid in "${pids[@]}"; do
    [[ $pid == "$ended" ]] || living+=("$pid")
  done
  pids=(${living[@]+"${living[@]}"})
  if ((result != 0 && code == 0)); then
    code=$result
    (sleep 5 && signal_all TERM && sleep 5 && signal_all KILL) >/dev/null 2>&1 &
    ender=$!
  fi
done
[[ -z ${ender:-} ]] || kill "$ender" 2>/dev/null || true
exit "$code"
