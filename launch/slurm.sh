#!/usr/bin/env bash
# Training on GPU nodes of a Slurm cluster: one process a node, which takes all GPUs of its node.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=configs/basis.py:kontext --workdir=/shared/run ...
#
# Submit it from the project's folder, which all nodes must see, as they must see --workdir and the data. Everything
# after the script's name goes to lorweb_jax.main. Options of sbatch before it overrule the lines below.
#
# PYTHON   which Python; .venv/bin/python of the project by default
#
# Two minutes before the time limit, and when the job is preempted, the run writes a checkpoint and ends; the job then
# queues itself again and goes on from there. So it does after a node has failed. A run that fails otherwise stays
# failed; submit it again, it goes on from its last checkpoint too.
#SBATCH --job-name=lorweb
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a job for Slurm; submit it with: sbatch --nodes=4 launch/slurm.sh --config=..."
[[ " $* " == *" --config"* ]] || fail "no config was given; add --config=configs/basis.py:kontext, say"
[[ " $* " == *" --workdir"* ]] || fail "no run folder was given; add --workdir=... on a file system that all nodes share"
cd "$SLURM_SUBMIT_DIR"
[[ -f lorweb_jax/main.py ]] || fail "$SLURM_SUBMIT_DIR is not the project's folder; submit the job from there"
python=${PYTHON:-$PWD/.venv/bin/python}
command -v "$python" >/dev/null || fail "there is no $python; make it with 'make .venv/installed', or set PYTHON"

export LORWEB_STOP_STATUS=75  # of a run that was stopped before its end
trap : TERM                   # the processes have it from Slurm; this script waits for them
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --label \
  "$python" -m lorweb_jax.main "$@" &
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do status=0; wait $! || status=$?; done  # a signal ended the wait, not srun
if ((status == 75)); then
  echo "stopped before its end; queueing job $SLURM_JOB_ID again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
