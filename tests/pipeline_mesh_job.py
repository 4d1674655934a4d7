"""What test_pipeline_mesh.py compares: pictures that a small pipeline makes on one device and on meshes of eight, as an
.npz file, and what the devices send each other in the transformer.

python tests/pipeline_mesh_job.py OUT
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden import golden_dir

from lorweb_jax import Pipeline
from lorweb_jax.pipeline import devices

# Of the tiny pipeline's 4 heads, 16 tokens of text and 2 × 16 of images; quadrants of 32 pixels.
MESHES = {"one": None, "sequence": {"sequence": 4}, "all": {"fsdp": 2, "sequence": 2, "tensor": 2}}
_SENT = re.compile(r" = .+ (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(.*op_name=")


def pictures(mesh: dict[str, int] | None) -> dict[str, np.ndarray]:
    pipeline = Pipeline.load(golden_dir() / "tiny_pipeline", mesh=mesh).attach(golden_dir() / "basis_a.safetensors")
    recorded = np.load(golden_dir() / "e2e_square.npz")
    a, a2, b = (recorded[name] for name in ("image_a", "image_atag", "image_b"))
    kernel = pipeline.model.transformer.single_transformer_blocks.proj_out.kernel[...]
    mix, steps = pipeline.coefficients(a, a2, b), []
    made = {"share": np.array(kernel.addressable_shards[0].data.size / kernel.size)}
    if mesh != MESHES["all"]:
        adapted = pipeline.adapt(a, a2, b, steps=2, max_size=64).coefficients
        made["adapted"] = np.concatenate([c.ravel() for c in adapted.values()])
        made["folded"] = pipeline.edit(a, a2, b, steps=2, folded=True)
    if mesh != MESHES["sequence"]:
        style = pipeline.style(mix, strength=2.0)
        with pipeline.session(mix, folded=False, styles=style) as session:
            made["styled"] = session.edit(a, a2, b, steps=2, callback=lambda step, _: steps.append(step))
        made["steps"] = np.array(steps)
    return made


def sent_in_blocks(mesh: dict[str, int]) -> list[str]:
    """The kinds of collectives in the transformer's loops over blocks, each as often as it stands there."""
    transformer = Pipeline.load(golden_dir() / "tiny_pipeline", mesh=mesh).model.transformer
    config, numbers = transformer.config, jax.random.normal

    def velocity(transformer, key):
        tokens, text = numbers(key, (1, 32, config.in_channels)), numbers(key, (1, 16, config.joint_attention_dim))
        pooled, ids = numbers(key, (1, config.pooled_projection_dim)), jnp.zeros((32, 3))
        return transformer(tokens, text, pooled, jnp.ones(1), jnp.ones(1), ids, jnp.zeros((16, 3)))

    with jax.set_mesh(devices.mesh_of(transformer)):
        text = nnx.jit(velocity).lower(transformer, jax.random.key(0)).compile().as_text()
    return [match[1] for line in text.splitlines() if "blocks/while/body" in line and (match := _SENT.search(line))]


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than what is computed
    made = {f"{name}/{what}": each for name, mesh in MESHES.items() for what, each in pictures(mesh).items()}
    # A basis of one mesh, taken to one device.
    basis = Pipeline.load(golden_dir() / "tiny_pipeline", mesh=MESHES["all"]).attach(
        golden_dir() / "basis_a.safetensors"
    )
    alone = Pipeline.load(golden_dir() / "tiny_pipeline").attach(basis.model.basis)
    recorded = np.load(golden_dir() / "e2e_square.npz")
    made["back"] = alone.edit(*(recorded[name] for name in ("image_a", "image_atag", "image_b")), steps=2, folded=True)
    np.savez(sys.argv[1], **made, sent=np.array(sent_in_blocks(MESHES["sequence"])))
