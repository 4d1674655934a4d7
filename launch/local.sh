#!/usr/bin/env bash
# Several processes on this machine as one run, over loopback with collectives on the CPU: to try what many hosts do.
#
#   launch/local.sh N [options of lorweb_jax.main]
#   launch/local.sh 2 --config=configs/basis.py:smoke --workdir=runs/two
#
# LORWEB_LOCAL_DEVICES   CPU devices of each process; 1 by default
# JAX_COORDINATOR_PORT   port of process 0; a free one by default
# PYTHON                 which Python; .venv/bin/python if there is one
#
# Lines are marked with the number of their process. Ctrl-C or SIGTERM reaches all processes: the run writes a
# checkpoint and ends. When one ends badly the others end too; the exit status is the worst one.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

[[ $# -ge 1 && $1 =~ ^[1-9][0-9]*$ ]] || fail "the number of processes must come first, such as: launch/local.sh 2 --config=configs/basis.py:smoke"
count=$1
shift
devices=${LORWEB_LOCAL_DEVICES:-1}
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "LORWEB_LOCAL_DEVICES is '$devices'; give a number of devices, 1 or more"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES=$count PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
port=${JAX_COORDINATOR_PORT:-$("$python" -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_COORDINATOR_BIND_ADDRESS=localhost:$port

mark() { trap '' INT TERM; exec sed -u "s/^/[$1] /"; }

pids=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$python" -m lorweb_jax.main "$@" > >(mark "$i") 2> >(mark "$i" >&2) &
  pids+=($!)
  echo "[$i] pid ${pids[i]}"
done

tell_all() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'tell_all TERM' TERM INT

worst=0
declare -A alive
for pid in "${pids[@]}"; do alive[$pid]=1; done
while ((${#alive[@]} > 0)); do
  for pid in "${!alive[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      status=0
      wait "$pid" 2>/dev/null || status=$?
      unset "alive[$pid]"
      ((status <= worst)) || worst=$status
    fi
  done
  # The others find out by themselves; this is for those that don't.
  if ((worst > 0)) && [[ -z ${watcher:-} ]]; then
    (sleep 150; tell_all KILL) > /dev/null 2>&1 &
    watcher=$!
  fi
  sleep 0.2
done
[[ -z ${watcher:-} ]] || kill "$watcher" 2>/dev/null || true
exit "$worst"
