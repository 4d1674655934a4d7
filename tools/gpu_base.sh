#!/usr/bin/env bash
# The small base on one GPU within a time limit, in one call:
#   OUT=folder tools/gpu_base.sh [seconds, default 300] [options of gpu_base.py, such as --tiny]
# Needs local_data/drawings64.npz and local_data/gpu (python tools/gpu_base.py --prepare), and of packages jax, flax,
# optax, numpy and Pillow. Results are written to $OUT as they come. CLIP's vision tower is trained beside, unless
# CLIP_SECONDS=0 (it needs python tools/gpu_clip.py --prepare). tools/gpu_session.sh says how speed.py shares the call.
set -u
cd "$(dirname "$0")/.."
seconds=${1:-300}
shift || true
out=${OUT:-runs/gpu_base}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
python=${PYTHON:-python3}
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null
if [ "${CLIP_SECONDS:-100}" -gt 0 ]; then
  # Beside the transformer; earlier it would have to share the GPU and the processors with the autoencoder.
  (sleep "${CLIP_DELAY:-70}"; XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.15 \
    "$python" tools/gpu_clip.py --seconds "${CLIP_SECONDS:-100}" --out "$out" ${CLIP_OPTIONS:-}) &
  clip=$!
fi
XLA_PYTHON_CLIENT_MEM_FRACTION=${MEM_FRACTION:-.78} "$python" tools/gpu_base.py --seconds "$seconds" --out "$out" "$@"
status=$?
if [ -n "${clip:-}" ]; then wait "$clip" || echo "CLIP vision ended with status $?"; fi
exit $status
