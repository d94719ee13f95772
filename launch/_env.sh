#!/usr/bin/env bash
# Starts one process of a run: launch/_env.sh train CONFIG.py [--field value ...]
#
# The other launchers start this script on every host. On a single machine it can be called directly.
# It sets the address of process 0, the number of processes and the index of this one, chooses the GPUs of a
# SLURM task, sets the compiler flags, and runs `crosslmm` with `exec`: without a shell in between, a SIGTERM
# from the scheduler reaches python, which saves and stops. The same command resumes from the last checkpoint.
#
# Environment variables:
#   PYTHON                the interpreter (default: python)
#   CROSSLMM_XLA_FLAGS    all: adds compiler flags for TPUs that may help but were not measured (default: none)
#   COORDINATOR_ADDRESS   host:port of process 0   } known to SLURM; on GKE TPUs leave
#   NUM_PROCESSES         number of processes      } them unset: JAX finds the processes
#   PROCESS_ID            index of this process    } of all slices by itself
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}

# SLURM lets all tasks of a node see all GPUs that the job has there, unless it binds them (--gpus-per-task,
# --gpu-bind). Then each task takes its share, and a single one takes all. Some clusters leave the choice to the
# job, and set no CUDA_VISIBLE_DEVICES.
choose_gpus() {
  local visible tasks share
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}"
  IFS=, read -ra tasks <<<"$SLURM_GTIDS"
  if ((${#tasks[@]} == 1 || ${#visible[@]} < SLURM_GPUS_ON_NODE)); then
    return
  fi
  share=$((${#visible[@]} / ${#tasks[@]}))
  if ((share * ${#tasks[@]} != ${#visible[@]})); then
    echo "crosslmm: error: node ${SLURMD_NODENAME:-} has ${#tasks[@]} tasks for ${#visible[@]} GPU(s), which they" \
      "cannot share evenly; set --ntasks-per-node to 1 or to the number of GPUs per node" >&2
    exit 2
  fi
  visible=("${visible[@]:SLURM_LOCALID * share:share}")
  CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${visible[*]}")
  export CUDA_VISIBLE_DEVICES
}

if [[ -n ${SLURM_PROCID:-} && -n ${SLURM_STEP_NODELIST:-} && -z ${PROCESS_ID:-} ]]; then
  if [[ -z ${COORDINATOR_ADDRESS:-} ]]; then
    # Without slurm.sbatch, which holds a free port, this one may be taken: then the run ends at once.
    hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST") # not `| head`: scontrol fails if its reader stops early
    export COORDINATOR_ADDRESS="${hosts%%$'\n'*}:$((61440 + SLURM_JOB_ID % 4096))"
  fi
  export NUM_PROCESSES=$SLURM_NTASKS PROCESS_ID=$SLURM_PROCID
  ((${SLURM_GPUS_ON_NODE:-0} == 0)) || choose_gpus
fi

line=$("$python" -m crosslmm_jax.parallel.xla_flags)
eval "$line"

exec "$python" -m crosslmm_jax.cli "$@"
