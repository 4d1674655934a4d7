#!/usr/bin/env bash
# What some minutes on one bare H100 or H200 settle:  tools/gpu_session.sh [FOLDER [--tiny]]
# Most important first, each part with a time limit, results in FOLDER (default: $OUT) as they come. Needs jax, flax,
# optax, numpy and safetensors; torch, diffusers and peft for the comparison; pydantic and ml_collections for parity.
# --tiny rehearses it on any machine. SPEED_SECONDS, TORCH_SECONDS and PARITY_SECONDS are the limits; GROUPS_TIMED what
# speed.py measures.
#
# In one call with the small base, whose training leaves the processors idle: speed.py compiles beside it, and measures
# once it has ended. On the H100 of 27 November 2026 it was started 66 s later:
#   (tools/gpu_base.sh 405; touch "$OUT/trained") &
#   sleep 66; XLA_PYTHON_CLIENT_MEM_FRACTION=.94 python3 tools/gpu_session/speed.py --out "$OUT" --seconds 520 \
#       --after "$OUT/trained" --groups unstacked,stacked,int8; wait
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
