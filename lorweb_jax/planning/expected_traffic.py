"""What a step must send between devices by the sharding rules, where no compiler is at hand to say what it sends."""

import jax.numpy as jnp

from lorweb_jax.planning.collectives import Traffic
from lorweb_jax.planning.program import Program


def expected_traffic(program: Program) -> dict[str, Traffic]:
    """{kind: Traffic}, bytes counted as in collectives.py; within 2 % of what the TPU compiler makes of fsdp alone.

    Modulations, router and encoders are left out: little travels for them."""
    job, mesh = program.job, program.mesh
    backbone, itemsize = job.folder.backbone, jnp.dtype(job.config.compute_dtype).itemsize
    data, fsdp, parts, tensor = (mesh.shape[name] for name in ("data", "fsdp", "sequence", "tensor"))
    training = program.what == "train"
    # Going backward a block's weights are gathered once, even if its forward pass is recomputed.
    times = job.passes * job.config.train.accumulate if training else program.steps
    passes = 2 * times if training else times
    traffic: dict[str, Traffic] = {}
    modulations = tuple(path for path, layer in backbone.adapted.items() if layer.modulation)

    def factors(shapes) -> int:
        """Numbers of the A's and B's."""
        layers = ((name.rpartition("."), shape.size) for name, shape in shapes.items())
        return sum(
            size for (path, _, part), size in layers if part in ("a", "free_a", "b") and not path.endswith(modulations)
        )

    low_rank, trained = factors(program.groups["basis"]), factors(program.gradients)

    if fsdp > 1:
        base = program.groups["base"]
        kernels = [base[f"transformer.{path}.kernel"] for path in backbone.scanned]
        whole = low_rank * itemsize + sum(shape.size * shape.dtype.itemsize for shape in kernels)
        traffic["all-gather"] = Traffic(passes * backbone.blocks, passes * whole / tensor * (fsdp - 1) / fsdp)
    reduced = Traffic()
    if training and data * fsdp * parts > 1:
        sums = backbone.blocks * times
        each = trained / job.passes  # a pass has the gradients of its own part
        reduced = Traffic(sums, 2 * times * each * itemsize / tensor * (1 - 1 / (data * fsdp * parts)))
    batch = job.micro_batch if training else program.batch
    local = (batch // (data * fsdp) if batch % (data * fsdp) == 0 else batch) / parts
    if training:
        passes += times * (job.config.remat != "none")
    if parts > 1:
        # q, k, v and what attention makes of them, once a block; its two streams, where there are two, count as one.
        count, tokens = 4 * passes * backbone.blocks, job.sequence + job.folder.text_tokens
        sent = count * local * tokens * backbone.features * itemsize / tensor * (parts - 1) / parts
        traffic["all-to-all"] = Traffic(count, sent)
    if tensor > 1:
        # After each product whose inputs are split, as many going backward; those of the text beside the image's.
        rows = [layer for layer in backbone.scanned.values() if layer.role == "row"]
        count = passes * sum(layer.depth for layer in rows if layer.stream != "text")
        outputs = passes * sum(
            layer.depth * layer.rows(job.sequence, job.folder.text_tokens) * layer.outputs for layer in rows
        )
        reduced = Traffic(reduced.count + count, reduced.sent + 2 * local * outputs * itemsize * (tensor - 1) / tensor)
    if reduced.count:
        traffic["all-reduce"] = reduced
    return traffic
