"""What a step must send between devices by the sharding rules, where no compiler is at hand to say what it sends."""

import jax.numpy as jnp

from lorweb_jax.planning.collectives import Traffic
from lorweb_jax.planning.program import Program
from lorweb_jax.planning.shapes import tokens


def expected_traffic(program: Program) -> dict[str, Traffic]:
    """{kind: Traffic}, bytes counted as in collectives.py; within 2 % of what the TPU compiler makes of fsdp alone.

    Modulations, router and encoders are left out: little travels for them."""
    job, mesh = program.job, program.mesh
    backbone, itemsize = job.folder.backbone, jnp.dtype(job.config.compute_dtype).itemsize
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    training = program.what == "train"
    # Going backward a block's weights are gathered once, even if its forward pass is recomputed.
    passes = 2 if training else program.steps
    traffic: dict[str, Traffic] = {}
    low_rank = sum(
        program.groups["basis"][f"basis.layers.{path}.{part}"].size for path in backbone.scanned for part in "ab"
    )

    if fsdp > 1:
        base = program.groups["base"]
        kernels = [base[f"transformer.{path}.kernel"] for path in backbone.scanned]
        whole = low_rank * itemsize + sum(shape.size * shape.dtype.itemsize for shape in kernels)
        traffic["all-gather"] = Traffic(passes * backbone.blocks, passes * whole / tensor * (fsdp - 1) / fsdp)
    reduced = Traffic()
    if training and data * fsdp > 1:
        reduced = Traffic(backbone.blocks, 2 * low_rank * itemsize / tensor * (1 - 1 / (data * fsdp)))
    if tensor > 1:
        # After each product whose inputs are split, as many going backward; those of the text beside the image's.
        local = program.batch // (data * fsdp) if program.batch % (data * fsdp) == 0 else program.batch
        times = passes + (training and job.config.remat != "none")
        rows = [layer for layer in backbone.scanned.values() if layer.role == "row"]
        count = times * sum(layer.depth for layer in rows if layer.stream != "text")
        outputs = times * sum(
            layer.depth * layer.rows(2 * tokens(job), job.folder.text_tokens) * layer.outputs for layer in rows
        )
        reduced = Traffic(reduced.count + count, reduced.sent + 2 * local * outputs * itemsize * (tensor - 1) / tensor)
    if reduced.count:
        traffic["all-reduce"] = reduced
    return traffic
