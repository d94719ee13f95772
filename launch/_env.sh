#!/usr/bin/env bash
# One process of a run: launch/_env.sh train CONFIG.py [--field value ...]
#
# The other launchers start this on every host; it may also be called by itself on a single machine.
# It tells the process its place among the others, sets the compiler flags, and becomes `crosslmm`: `exec`
# leaves no shell in between, so a SIGTERM of the scheduler reaches python, which saves and stops.
# The same command again goes on from the last checkpoint.
#
# Set where the defaults do not fit:
#   PYTHON               the interpreter (default: python)
#   CROSSLMM_XLA_FLAGS   all: compiler flags for TPUs that may help and were never measured; default: none
#   COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID   host:port of process 0, how many, which one this is;
#                        found by itself under SLURM and on TPUs of GKE
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}

if [[ -z ${COORDINATOR_ADDRESS:-} && -n ${SLURM_PROCID:-} && -n ${SLURM_STEP_NODELIST:-} ]]; then
  hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST")  # whole: a pipe that stops reading fails scontrol
  export COORDINATOR_ADDRESS="${hosts%%$'\n'*}:$((61440 + SLURM_JOB_ID % 4096))"
  export NUM_PROCESSES=$SLURM_NTASKS PROCESS_ID=$SLURM_PROCID
elif [[ -z ${COORDINATOR_ADDRESS:-} && -n ${TPU_WORKER_HOSTNAMES:-} && -n ${TPU_WORKER_ID:-} ]]; then
  IFS=, read -ra hosts <<<"$TPU_WORKER_HOSTNAMES"
  export COORDINATOR_ADDRESS="${hosts[0]}:8476" NUM_PROCESSES=${#hosts[@]} PROCESS_ID=$TPU_WORKER_ID
fi

line=$("$python" -m crosslmm_jax.parallel.xla_flags)
eval "$line"

exec "$python" -m crosslmm_jax.cli "$@"
