#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice, started from your machine:
#   launch/tpu_vm.sh CONFIG.py [--field value ...]
#
# Every host needs the repository with its environment in FOLDER. `run.out` of the config must be a folder
# that all hosts can write. All hosts are checked before one starts. The exit code is that of training.
# Training continues when the connection is lost. While it runs, a second start is refused: stop the first with
# STOP=1, which sends SIGTERM, so that it saves. The same command resumes.
# We never ran this on a TPU: read it before you use it.
#
# Environment variables:
#   TPU, ZONE   name and zone of the slice
#   PROJECT     Google Cloud project (default: that of gcloud's configuration)
#   FOLDER      the repository on the hosts (default: crosslmm in the home folder)
#   PYTHON      the interpreter on the hosts (default: .venv/bin/python in FOLDER)
#   PORT        of process 0 (default: 8482)
#   STOP        1: stop the run
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
if [[ $# -lt 1 && ${STOP:-0} != 1 ]]; then
  echo "usage: TPU=name ZONE=zone $0 CONFIG.py [--field value ...]" >&2
  exit 2
fi
folder=${FOLDER:-crosslmm}

# Runs launch/_tpu_host.sh with these words on all hosts; gcloud returns the first exit code that is not 0.
on_all_hosts() {
  local script missing command
  script=$(printf %q "$folder/launch/_tpu_host.sh")
  missing="crosslmm: error: \$(hostname) has no $script; copy the repository there, or set FOLDER"
  command="[ -x $script ] || { echo \"$missing\" >&2; exit 2; }"
  command+="; cd $(printf %q "$folder") && PYTHON=$(printf %q "${PYTHON:-.venv/bin/python}") PORT=${PORT:-8482}"
  command+=" exec launch/_tpu_host.sh$(printf ' %q' "$@")"
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all \
    --command="$command"
}

if [[ ${STOP:-0} == 1 ]]; then
  on_all_hosts stop
else
  on_all_hosts check
  on_all_hosts start "$@"
fi
