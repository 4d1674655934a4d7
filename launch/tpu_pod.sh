#!/usr/bin/env bash
# Training on all hosts of a Cloud TPU slice that exists already, one process a host.
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/basis.py:kontext --workdir=/mnt/shared/run ...
#
# NAME and ZONE are those of the TPU VM, or of a queued resource's TPU VM; everything after them goes to
# lorweb_jax.main. gcloud must be installed here and know the project. --workdir, the weights and the data must lie on
# storage that is mounted at the same place on all hosts (Filestore, or a bucket with gcsfuse).
#
# Copies the project's files, installs what it needs into ~/lorweb on every host, starts the run detached and shows
# what process 0 says; Ctrl-C ends only the showing, and the same command shows the run again. A run that was stopped
# (preemption, maintenance) or lost a host is started again, from its last checkpoint, once the TPU is READY.
# To stop it, end this script and give
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='kill -TERM -- -$(cat lorweb/pid)'
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

(($# >= 3)) || fail "name, zone and options are needed, such as: launch/tpu_pod.sh my-tpu us-east5-b --config=... --workdir=..."
name=$1 zone=$2
shift 2
[[ $name != -* && $zone != -* ]] || fail "the TPU's name and zone come first, and $name $zone looks like options"
[[ " $* " == *" --config"* ]] || fail "no config was given; add --config=configs/basis.py:kontext, say"
[[ " $* " == *" --workdir"* ]] || fail "no run folder was given; add --workdir=... on storage that all hosts share"
command -v gcloud >/dev/null || fail "gcloud was not found; install the Google Cloud CLI and log in"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tpu() { local what=$1; shift; gcloud compute tpus tpu-vm "$what" "$@" --zone="$zone"; }
on() { tpu ssh "$name" --worker="$1" --command="$2"; }

running='{ kill -0 "$(cat lorweb/pid)"; } 2> /dev/null'  # on a host

wait_until_ready() {
  local state
  until state=$(tpu describe "$name" --format='value(state)' 2>/dev/null) && [[ $state == READY ]]; do
    echo "$name is ${state:-not there}; waiting until it is READY"
    sleep 30
  done
}

install() {
  local archive
  archive=$(mktemp -d)/lorweb.tar.gz
  git ls-files -z | tar --null --files-from=- -czf "$archive"
  tpu scp "$archive" "$name:lorweb.tar.gz" --worker=all
  rm -r "$(dirname "$archive")"
  on all 'mkdir -p lorweb && tar -xzf lorweb.tar.gz -C lorweb && cd lorweb && make .venv/installed &&
    .venv/bin/python -m pip install --quiet "jax[tpu]==$(.venv/bin/python -c "import jax; print(jax.__version__)")"'
}

start() {  # once what is left of an earlier run has ended
  on all "for i in \$(seq 150); do $running || break; sleep 1; done; cd lorweb && rm -f status &&
    LORWEB_STOP_STATUS=75 setsid nohup bash -c 'echo \$\$ > pid; trap : TERM
    .venv/bin/python -m lorweb_jax.main \"\$@\"; echo \$? > status' \
    run $(printf '%q ' "$@") > run.log 2>&1 < /dev/null & sleep 2"
}

wait_until_ready
if ! on 0 "$running"; then
  install
  start "$@"
fi
while true; do
  on 0 'tail -n +1 -f lorweb/run.log --pid="$(cat lorweb/pid)"' || true
  status=$(on 0 "cat lorweb/status 2> /dev/null || { $running && echo runs; }" || echo gone)
  case $status in
    0) exit 0 ;;
    2) exit 2 ;;      # a wrong request, which another start doesn't mend
    runs) sleep 5 ;;  # the connection broke
    *)
      echo "the run ended ($status); it is started again"
      sleep 30
      wait_until_ready
      install
      start "$@"
      ;;
  esac
done
