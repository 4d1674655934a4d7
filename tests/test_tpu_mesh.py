"""What stands around the TPU's kernels splits examples, tokens and heads over a mesh as it should."""

import os
import subprocess
import sys
from pathlib import Path


def test_split_heads_examples_and_tokens_compute_the_same():
    job = subprocess.run(
        [sys.executable, Path(__file__).with_name("tpu_mesh_job.py")],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr
    errors = [float(line) for line in job.stdout.split()]
    # Of each mesh: two parts of the result, gradients of q, k, v and of the norms' scales by part; and the branch's.
    assert len(errors) == 2 * (2 + 6 + 4 + 5) and max(errors) <= 1e-5
