"""case_*.npz: the transformer with and without a basis, its coefficients, intermediates and gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.formats.layer_names import layer_name, split_layer_name
from lorweb_jax.adapters.mixture import LowRankAdapter, RoutedAdapter
from lorweb_jax.models.flux1.embeddings import rotary
from lorweb_jax.models.flux1.model import Flux
from parity.folder import Bases, RecordedBasis, RecordedModels, Recording
from parity.report import COEFFICIENT, GRADIENT, INTERNAL_COEFFICIENT, OUTPUT, Absent, Comparison

_PARTS = {"lora_A": "a", "lora_B": "b", "lora_keys": "keys", "att_lora_to_q.weight": "projection"}


class Inputs(NamedTuple):
    """The arguments of Flux, in order."""

    hidden_bsc: Any
    text_btj: Any
    pooled_bp: Any
    timestep_b: Any
    guidance_b: Any
    image_ids_s3: Any
    text_ids_t3: Any


@jax.jit
def velocity(model: Flux, inputs: Inputs, adapters: dict | None) -> jax.Array:
    return model(*inputs, adapters=adapters)


def adapters_of(basis: Basis, query: np.ndarray | None) -> dict[str, LowRankAdapter | RoutedAdapter]:
    """What a basis adds for a recorded external query [b, tokens, width]."""
    if basis.config.coefficients.from_images and query is None:
        raise Absent("the recording has no external_query")
    return basis.adapters(basis.coefficients(None if query is None else jnp.asarray(query)))


@functools.partial(jax.jit, static_argnums=4)
def loss_and_gradients(model: Flux, basis: Basis, query, inputs: Inputs, loss: Callable, *given):
    """(loss(velocity, *given), {path: {part: gradient}}) with respect to everything that the basis trains."""
    graphdef, state = nnx.split(basis)

    def of_basis(state):
        adapters = adapters_of(nnx.merge(graphdef, state), query)
        return loss(model(*inputs, adapters=adapters), *given)

    value, gradient = jax.value_and_grad(of_basis)(state)
    return value, nnx.merge(graphdef, gradient).to_arrays()


@jax.jit
def trace(model: Flux, inputs: Inputs, adapters: dict) -> dict[str, jax.Array]:
    """What each module returns, by diffusers' name (a double block's text is .0, its image .1), and "mix/<layer>"
    for layers that find their own coefficients. Blocks run one by one; the equations are the model's."""
    found = {}
    vector = found["time_text_embed"] = model.time_text_embed(inputs.timestep_b, inputs.guidance_b, inputs.pooled_bp)
    image = found["x_embedder"] = model.x_embedder(inputs.hidden_bsc)
    text = found["context_embedder"] = model.context_embedder(inputs.text_btj)
    rope = rotary(jnp.concatenate([inputs.text_ids_t3, inputs.image_ids_s3]), model.config.axes_dims_rope)
    found |= {f"pos_embed.{index}": jnp.repeat(part, 2, axis=-1) for index, part in enumerate(rope)}
    for index, (block, add) in enumerate(_blocks(model, "transformer_blocks", adapters, found)):
        image, text = block(image, text, _modulations(model, "transformer_blocks", block, vector, add), rope, add)
        found[f"transformer_blocks.{index}.0"], found[f"transformer_blocks.{index}.1"] = text, image
    x = jnp.concatenate([text, image], axis=1)
    for index, (block, add) in enumerate(_blocks(model, "single_transformer_blocks", adapters, found)):
        x = found[f"single_transformer_blocks.{index}"] = block(
            x, _modulations(model, "single_transformer_blocks", block, vector, add), rope, add, text.shape[1]
        )
    found["norm_out"] = model.norm_out(x[:, text.shape[1] :], model.norm_out.vectors(vector))
    return found


def _modulations(model: Flux, stack: str, block, vector_bd: jax.Array, add: dict) -> dict[str, jax.Array]:
    return {name: getattr(block, name)(vector_bd, add.get(f"{name}.linear")) for name in model.modulation_names(stack)}


class _Recorded(NamedTuple):
    """An adapter whose coefficients go into `found`, where the layer's input decides them."""

    mix: LowRankAdapter | RoutedAdapter
    name: str
    found: dict

    def inner(self, dtype):
        return self.mix.inner(dtype)

    def outer(self, h, x, text_tokens):
        if isinstance(self.mix, RoutedAdapter):
            self.found[f"mix/{self.name}"] = self.mix.coefficients(x, text_tokens)
        return self.mix.outer(h, x, text_tokens)


def _blocks(model: Flux, stack: str, adapters: dict, found: dict):
    """Each block of a stack with what its layers add; coefficients that are found on the way go into `found`."""
    graphdef, state = nnx.split(getattr(model, stack))

    for index in range(jax.tree.leaves(state)[0].shape[0]):

        def here(tree, index=index):
            return jax.tree.map(lambda leaf: leaf[index], tree)

        yield (
            nnx.merge(graphdef, here(state)),
            {
                path.removeprefix(f"{stack}."): _Recorded(here(mix), layer_name(path, index), found)
                for path, mix in adapters.items()
                if path.startswith(f"{stack}.")
            },
        )


def check_case(report: Comparison, name: str, data: Recording, bases: Bases, models: RecordedModels) -> None:
    """One forward pass: velocities, coefficients, intermediates of the plain model, gradients of Σ output²."""
    query = data.get("external_query")
    inputs = Inputs(*(data.get(key) for key in _INPUTS))
    runnable = all(part is not None for field, part in inputs._asdict().items() if field != "guidance_b")

    @functools.cache
    def adapted() -> RecordedBasis:
        return bases.get(name.removeprefix("case_"))

    @functools.cache
    def output(which: str):
        model = models.transformer
        basis = None if which == "base" else getattr(adapted(), which)
        return velocity(model, inputs, basis and adapters_of(basis, query))

    @functools.cache
    def coefficients():
        if not adapted().config.coefficients.in_advance:
            return {
                key.removeprefix("mix/"): value
                for key, value in trace(models.transformer, inputs, adapters_of(adapted().basis, None)).items()
                if key.startswith("mix/")
            }
        stacked = {path: mix.coeff_bn for path, mix in adapters_of(adapted().basis, query).items()}
        return {
            layer_name(path, index): block for path, blocks in stacked.items() for index, block in enumerate(blocks)
        }

    @functools.cache
    def intermediates():
        return trace(models.transformer, inputs, adapters_of(adapted().basis, query))

    def intermediate(key):
        if key not in intermediates():
            raise Absent("nothing here has this name")
        return intermediates()[key]

    @functools.cache
    def gradients():
        return loss_and_gradients(models.transformer, adapted().basis, query, inputs, _sum_of_squares)

    mix_tolerance = COEFFICIENT if bases.in_advance(name.removeprefix("case_")) else INTERNAL_COEFFICIENT
    for key, theirs in data.items():
        kind, _, rest = key.partition("/")
        if key in _OUTPUTS:
            ours, tolerance = functools.partial(output, _OUTPUTS[key]), OUTPUT
        elif kind == "mix":
            ours, tolerance = lambda rest=rest: coefficients()[rest], mix_tolerance
        elif kind == "dbg":
            ours, tolerance = functools.partial(intermediate, rest), OUTPUT
        elif key == "grad_loss":
            ours, tolerance = lambda: gradients()[0], OUTPUT
        elif kind == "grad":
            ours, tolerance = lambda rest=rest: gradient_of(gradients()[1], rest), GRADIENT
        else:
            continue
        if runnable or (kind == "mix" and query is not None):
            report.compare(f"{name} {key}", ours, theirs, tolerance)
        else:
            report.skip(f"{name} {key}", "the recording lacks some of the transformer's inputs")


_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids")
_OUTPUTS = {"base_output": "base", "output": "basis", "output_train_path": "basis", "output_fp16_file": "half"}


def _sum_of_squares(velocity_bsc):
    return jnp.square(velocity_bsc).sum()


def gradient_of(gradients: dict, name: str) -> jax.Array:
    """From {path: {part: [l, …]}}: the one that is called e.g. transformer_blocks.0.attn.to_q.lora_A."""
    suffix = next(suffix for suffix in _PARTS if name.endswith(f".{suffix}"))
    path, block = split_layer_name(name.removesuffix(f".{suffix}"))
    return gradients[path][_PARTS[suffix]][block]
