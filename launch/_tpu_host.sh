#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each host of a TPU VM slice, in the repository's folder:
#   launch/_tpu_host.sh check | stop | start CONFIG.py [--field value ...]
#
#   crosslmm.HOST.lock    locked while training runs; the system unlocks it however training ends
#   crosslmm.HOST.pid     the process that holds the lock
#   crosslmm.HOST.log     what training prints
set -euo pipefail
name=crosslmm.$(hostname)
fail() {
  local code=$1
  shift
  echo "crosslmm: error: $(hostname): $*" >&2
  exit "$code"
}
is_free() { flock --nonblock "$name.lock" true; }

# GCE_METADATA_IP is also what JAX reads.
attribute() {
  local url="http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
  curl --silent --fail --max-time 10 --retry 3 --header Metadata-Flavor:Google "$url" ||
    fail 1 "the metadata server does not tell $1 (curl: $?); is this a TPU VM?"
}

# Sets PROCESS_ID, NUM_PROCESSES and COORDINATOR_ADDRESS.
find_place() {
  local endpoints hosts
  PROCESS_ID=$(attribute agent-worker-number)
  endpoints=$(attribute worker-network-endpoints) # NAME:ID:ADDRESS or ADDRESS, separated by commas
  IFS=, read -ra hosts <<<"$endpoints"
  export PROCESS_ID NUM_PROCESSES=${#hosts[@]} COORDINATOR_ADDRESS="${hosts[0]##*:}:${PORT:-8482}"
}

case ${1:-} in
check)
  is_free || fail 1 "a run is active here (process $(cat "$name.pid")); stop it with STOP=1"
  [[ -n $(type -P "${PYTHON:-python}") ]] || fail 2 "no ${PYTHON:-python} in $PWD; install there, or set PYTHON"
  find_place
  ;;
start)
  shift
  find_place
  touch "$name.log"
  begin=$(($(stat --format=%s "$name.log") + 1))
  exec 9>"$name.lock"
  flock --nonblock 9 || fail 1 "a run is active here; stop it with STOP=1"
  # In a session of its own, and without this shell's descriptors: it outlives the connection.
  setsid nohup launch/_env.sh train "$@" >>"$name.log" 2>&1 </dev/null &
  pid=$!
  exec 9>&- # training alone holds the lock now
  echo "$pid" >"$name.pid"
  tail --bytes=+"$begin" --follow --pid="$pid" "$name.log" &
  code=0
  wait "$pid" || code=$?
  wait # for the last lines
  exit "$code"
  ;;
stop)
  if is_free; then
    echo "crosslmm: $(hostname): no run is active here"
  else
    kill -s TERM "$(cat "$name.pid")"
  fi
  ;;
*)
  fail 2 "usage: $0 check | stop | start CONFIG.py [--field value ...]"
  ;;
esac
