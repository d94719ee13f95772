#!/usr/bin/env bash
# Several processes on this machine: launch/local_multiproc.sh N CONFIG.py [--field value ...]
#
# On GPUs each process gets one; on a CPU (JAX_PLATFORMS=cpu) all share it, to try a multi-process run.
# SIGTERM and Ctrl-C are passed on, and one process that fails ends all. The same command resumes.
#
# Set where the defaults do not fit:
#   PORT                   of process 0 (default: picked from this shell's number)
#   CUDA_VISIBLE_DEVICES   the GPUs to use, by comma (default: 0 to N-1)
#   and those of launch/_env.sh
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N CONFIG.py [--field value ...], N processes" >&2
  exit 2
fi
count=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export COORDINATOR_ADDRESS="localhost:${PORT:-$((20000 + $$ % 20000))}" NUM_PROCESSES=$count
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
if ((${#gpus[@]} < count)); then
  echo "CUDA_VISIBLE_DEVICES names ${#gpus[@]} GPU(s) for $count processes; name at least $count" >&2
  exit 2
fi

pids=()
stopping=0
pass_on_term() { ((${#pids[@]} == 0)) || kill -s TERM "${pids[@]}" 2>/dev/null || true; }
# A shell starts what runs behind it deaf to SIGINT, so Ctrl-C travels as SIGTERM, which also saves.
trap 'stopping=1; pass_on_term' TERM INT
for ((index = 0; index < count && stopping == 0; index++)); do
  PROCESS_ID=$index CUDA_VISIBLE_DEVICES=${gpus[index]} "$here/_env.sh" train "$@" &
  pids+=($!)
done

# A signal interrupts `wait` with a code above 128 while the process lives: then it is waited for again.
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
    pass_on_term
  fi
done
exit "$code"
