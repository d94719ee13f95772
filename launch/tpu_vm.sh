#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice, started from your machine:
#   launch/tpu_vm.sh CONFIG.py [--field value ...]
#
# Every host needs the repository with its environment in FOLDER. `run.out` of the config must be a folder
# that all hosts can write. Training continues when the connection is lost. While it runs, a second start on a
# host is refused: stop the first with STOP=1, which sends SIGTERM, so that it saves. The same command resumes.
# We never ran this on a TPU: read it before you use it.
#
# Environment variables:
#   TPU, ZONE   name and zone of the slice
#   PROJECT     Google Cloud project (default: that of gcloud's configuration)
#   FOLDER      the repository on the hosts (default: crosslmm in the home folder)
#   PYTHON      the interpreter on the hosts (default: .venv/bin/python in FOLDER)
#   STOP        1: stop the run
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
if [[ $# -lt 1 && ${STOP:-0} != 1 ]]; then
  echo "usage: TPU=name ZONE=zone $0 CONFIG.py [--field value ...]" >&2
  exit 2
fi
folder=${FOLDER:-crosslmm}
python=${PYTHON:-.venv/bin/python}
if [[ ${STOP:-0} == 1 ]]; then
  remote="cd $(printf %q "$folder") && kill -s TERM \"\$(cat crosslmm.pid)\""
else
  words=$(printf ' %q' "$@")
  # The metadata server gives each host's index and all addresses, as NAME:ID:ADDRESS or ADDRESS, separated by
  # commas.
  remote=$(
    cat <<EOF
cd $(printf %q "$folder")
if [ -f crosslmm.pid ] && kill -0 "\$(cat crosslmm.pid)" 2>/dev/null; then
  echo "a run is already active on this host; stop it with STOP=1" >&2
  exit 1
fi
attribute() {
  curl -sf -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/\$1"
}
hosts=\$(attribute worker-network-endpoints | tr , '\n' | awk -F : '{ print \$NF }')
export PROCESS_ID=\$(attribute agent-worker-number) NUM_PROCESSES=\$(echo "\$hosts" | wc -l)
export COORDINATOR_ADDRESS=\$(echo "\$hosts" | head -n 1):8476 PYTHON=$(printf %q "$python")
nohup launch/_env.sh train$words >>crosslmm.log 2>&1 </dev/null &
echo \$! >crosslmm.pid
sleep 2
tail -n +1 -F --pid=\$(cat crosslmm.pid) crosslmm.log
EOF
  )
fi
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all \
  --command="$remote"
