#!/usr/bin/env bash
# What some minutes on one bare H100 or H200 settle:  tools/gpu_session.sh [FOLDER [--tiny]]
# Most important first, each part with a time limit, results in FOLDER (default: $OUT) as they come. Needs jax, flax,
# optax, numpy and safetensors; torch, diffusers and peft for the comparison; pydantic for parity. --tiny rehearses it
# on any machine. SPEED_SECONDS, TORCH_SECONDS and PARITY_SECONDS are the limits; GROUPS_TIMED what speed.py measures.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:?give a folder for the results}}
tiny=${2:-}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

seconds=${SPEED_SECONDS:-250}
timeout "$seconds" $python tools/gpu_session/speed.py --out "$out" --seconds $((seconds - 15)) \
    ${GROUPS_TIMED:+--groups "$GROUPS_TIMED"} $tiny > "$out/speed.log" 2>&1
grep -v "Delay kernel" "$out/speed.log" | tail -n 60
timeout "${TORCH_SECONDS:-90}" $python tools/gpu_session/torch_rows.py --out "$out" $tiny > "$out/torch.log" 2>&1
tail -n 15 "$out/torch.log"
XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=--xla_gpu_autotune_level=0 \
    timeout "${PARITY_SECONDS:-120}" $python tools/check_parity.py tests/golden > "$out/parity.txt" 2>&1
grep -v " ok$" "$out/parity.txt" | tail -n 15
