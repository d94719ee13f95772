#!/usr/bin/env bash
# Starts one process of a run: launch/_env.sh train CONFIG.py [--field value ...]
#
# The other launchers start this script on every host. On a single machine it can be called directly.
# It sets the address of process 0, the number of processes and the index of this one, sets the compiler
# flags, and runs `crosslmm` with `exec`: without a shell in between, a SIGTERM from the scheduler reaches
# python, which saves and stops. The same command resumes from the last checkpoint.
#
# Environment variables:
#   PYTHON                the interpreter (default: python)
#   CROSSLMM_XLA_FLAGS    all: adds compiler flags for TPUs that may help but were not measured (default: none)
#   COORDINATOR_ADDRESS   host:port of process 0   } found automatically
#   NUM_PROCESSES         number of processes      } under SLURM and
#   PROCESS_ID            index of this process    } on GKE TPUs
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}

if [[ -z ${COORDINATOR_ADDRESS:-} && -n ${SLURM_PROCID:-} && -n ${SLURM_STEP_NODELIST:-} ]]; then
  hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST")  # not `| head`: scontrol fails when its reader stops early
  export COORDINATOR_ADDRESS="${hosts%%$'\n'*}:$((61440 + SLURM_JOB_ID % 4096))"
  export NUM_PROCESSES=$SLURM_NTASKS PROCESS_ID=$SLURM_PROCID
elif [[ -z ${COORDINATOR_ADDRESS:-} && -n ${TPU_WORKER_HOSTNAMES:-} && -n ${TPU_WORKER_ID:-} ]]; then
  IFS=, read -ra hosts <<<"$TPU_WORKER_HOSTNAMES"
  export COORDINATOR_ADDRESS="${hosts[0]}:8476" NUM_PROCESSES=${#hosts[@]} PROCESS_ID=$TPU_WORKER_ID
fi

line=$("$python" -m crosslmm_jax.parallel.xla_flags)
eval "$line"

exec "$python" -m crosslmm_jax.cli "$@"
