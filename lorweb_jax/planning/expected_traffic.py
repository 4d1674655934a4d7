"""What a step must send between devices by the sharding rules, where no compiler is at hand to say what it does send."""

import jax.numpy as jnp

from lorweb_jax.planning.collectives import Traffic
from lorweb_jax.planning.program import Program
from lorweb_jax.planning.shapes import tokens
from lorweb_jax.transformer.flux import block_linears


def expected_traffic(program: Program) -> dict[str, Traffic]:
    """{kind: Traffic}, bytes counted as in collectives.py. Modulations and encoders are left out: little travels."""
    job, mesh = program.job, program.mesh
    flux, itemsize = job.folder.flux_config, jnp.dtype(job.config.compute_dtype).itemsize
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    training = program.what == "train"
    again = training and job.config.remat != "none"
    passes = (2 + again) if training else program.steps
    found: dict[str, Traffic] = {}
    blocks = flux.num_layers + flux.num_single_layers

    if fsdp > 1:
        kernels = {path.removesuffix(".kernel"): shape for path, shape in program.groups["base"].items()
                   if path.endswith(".kernel")}
        whole = sum(shape.size * shape.dtype.itemsize for path in block_linears(flux) if "norm" not in path
                    for shape in (kernels[f"transformer.{path}"],))
        whole += sum(shape.size * itemsize for shape in program.groups["basis"].values())
        found["all-gather"] = Traffic(passes * blocks, passes * whole / tensor * (fsdp - 1) / fsdp)
    gradients = sum(shape.size * shape.dtype.itemsize for shape in program.gradients.values()) / tensor
    if fsdp > 1 and gradients:
        found["reduce-scatter"] = Traffic(blocks, gradients * (fsdp - 1) / fsdp)
    reduced = Traffic()
    if data > 1 and gradients:
        reduced = Traffic(1, 2 * gradients / fsdp * (data - 1) / data)
    if tensor > 1:
        # After each product whose inputs are split: two of them in a double block, one in a single block; as many
        # going backward.
        local = program.batch // (data * fsdp) if program.batch % (data * fsdp) == 0 else program.batch
        rows = local * (2 * tokens(job) + job.folder.text_tokens)
        times = passes * (2 * flux.num_layers + flux.num_single_layers)
        reduced = Traffic(reduced.count + times, reduced.sent
                          + times * 2 * rows * flux.features * itemsize * (tensor - 1) / tensor)
    if reduced.count:
        found["all-reduce"] = reduced
    return found
