"""The public interface: load a pipeline, attach a basis, edit.

from lorweb_jax import Pipeline, read_image, write_image
pipeline = Pipeline.load("assets/small_kontext").attach("runs/basis")
a, a2, b = (read_image(f"{name}.png") for name in ("a", "a2", "b"))
result = pipeline.edit(a, a2, b, prompt="put a frame around it", seed=0)
write_image("result.png", result)
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.fold import can_fold, fold
from lorweb_jax.adapters.formats.basis_file import require_fits, write_basis
from lorweb_jax.adapters.formats.lora_file import NAMES, TruncationError, mixed_factors, truncate, write_lora
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.finite import require_finite
from lorweb_jax.common.outputs import require_free, told_if_unwritable
from lorweb_jax.files.state import abstract_shapes, fill
from lorweb_jax.images.grid import bottom_right, condition_grid, fit_to_model, stretched
from lorweb_jax.images.levels import to_uint8
from lorweb_jax.models.flux1.model import block_linears
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.encoder import ImageEncoder
from lorweb_jax.nn.attention import IMPLEMENTATIONS, resolve
from lorweb_jax.nn.layers import Adapter
from lorweb_jax.nn.quantization import KINDS
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.adapters import load_basis
from lorweb_jax.pipeline.arguments import MAX_SIZE, RANK, Images, as_analogies, as_path, as_prompts
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.settings.fields import GUIDANCE, SAMPLING_STEPS, Choice, Flag, Real, as_value
from lorweb_jax.settings.seeds import random_key

_DTYPES = Choice(("float32", "bfloat16", "float16"))
_ALPHA = Real(0, 1e6, above=True)


class Embeddings(Protocol):
    """What text and image encoders would say, from elsewhere (precomputed.read.Precomputed: from disk)."""

    image_encoder: ImageEncoder | None

    def prompt(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Instructions -> text [b, t, j] and pooled [b, p]."""

    def query(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        """Condition grids uint8 [H, W, 3] -> external queries [b, q]."""


class Pipeline:
    """A FLUX Kontext pipeline with, optionally, a basis of LoRAs. Images are uint8 [H, W, 3]."""

    def __init__(
        self,
        folder: PipelineFolder,
        model: AnalogyModel,
        precomputed: Embeddings | None = None,
        source: Path | None = None,
    ):
        """precomputed: where the model has no text or image encoder, what they would have said. source: where the basis
        was read from, if it was; nothing is written over it."""
        self.folder, self.model, self.precomputed, self.source = folder, model, precomputed, source

    @classmethod
    def load(
        cls,
        folder: str | Path,
        image_encoder: str | Path | None = None,
        *,
        dtype: Any = "float32",
        attention: str = "auto",
        quantization: str = "none",
    ) -> "Pipeline":
        """From a folder in diffusers' layout.

        image_encoder: the router's image encoder (CLIP ViT-L/14 or SigLIP2 folder); default `folder`/clip_vision.
        dtype: what weights of transformer and text encoders are kept and computed in. attention, quantization: see
        Flux; nothing is folded into a quantised transformer.
        Raises UserError for missing, truncated, damaged or foreign files, with the difference where keys don't match,
        and for weights that are not finite.
        """
        quantization = as_value(quantization, "quantization", Choice(KINDS))
        opened = PipelineFolder(
            as_path(folder, "the pipeline"),
            None if image_encoder is None else as_path(image_encoder, "the image encoder"),
        )
        dtype, device = _dtype(dtype), SingleDeviceSharding(jax.local_devices()[0])
        attention = as_value(attention, "attention", Choice(IMPLEMENTATIONS))
        attention = resolve(attention, jax.default_backend(), dtype, opened.flux_config.attention_head_dim)

        model = nnx.eval_shape(
            lambda: opened.make(nnx.Rngs(0), dtype=dtype, attention=attention, quantization=quantization)
        )
        made = abstract_shapes(model)

        def stored(path: str) -> jnp.dtype:
            if made[path].dtype != jnp.float32 or path.removesuffix(".scale") + ".kernel" in made:  # 8 bit
                return made[path].dtype
            return dtype if path.startswith(("transformer.", "text_encoder")) else jnp.dtype(jnp.float32)

        wanted = {
            path: jax.ShapeDtypeStruct(shape.shape, stored(path), sharding=device) for path, shape in made.items()
        }
        return cls(opened, fill(model, opened.read(wanted), str(folder)))

    def attach(self, basis: Basis | str | Path, config: str | Path | None = None) -> "Pipeline":
        """A pipeline with this basis: a Basis, a run's folder, a published basis, or an ordinary LoRA's file.

        config: the published basis's config.yaml, where it doesn't lie beside it. Weights are shared, not copied.
        Raises UserError for a basis that doesn't fit the transformer or the image encoder.
        """
        layers, source = block_linears(self.folder.flux_config), None
        if isinstance(basis, Basis):
            require_fits(basis.to_arrays(), layers, "the basis")
        else:
            config = None if config is None else as_path(config, "the basis's config")
            source = as_path(basis, "the basis")
            basis = Basis.from_arrays(*load_basis(source, layers, config))
        self.folder.complete(basis.config, self.model.image_encoder)
        self.folder.require_encoder(basis.config)
        return Pipeline(self.folder, _with(self.model, basis=basis), self.precomputed, source)

    def query(self, conditions: list[Images]) -> jax.Array:
        """The external query [b, q] of analogies (a, a′, b), each at its own size."""
        self._basis()
        return self._query(as_analogies(conditions))

    def _query(self, conditions: list[Images]) -> jax.Array:
        grids = [condition_grid(*images) for images in conditions]
        if self.model.image_encoder is None and self.precomputed:
            return jnp.asarray(self.precomputed.query(grids))
        views = queries.views(self.model.basis.config.query_mode, grids, self.folder.encoder.processor)
        return _query(self.model, jnp.asarray(views))

    def prompt(self, texts: list[str]) -> tuple[jax.Array, jax.Array]:
        """Instructions -> text [b, t, j] and pooled [b, p]. Says so where an encoder doesn't take all of one."""
        texts = as_prompts(texts)
        if self.model.text_encoder_2 is None and self.precomputed:
            return tuple(map(jnp.asarray, self.precomputed.prompt(texts)))
        self.folder.tell_left_out(texts, "prompt")
        return _prompt(self.model, *map(jnp.asarray, self.folder.token_ids(texts)))

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The router's image encoder, if there is one."""
        if self.model.image_encoder is None:
            return self.precomputed.image_encoder if self.precomputed else None
        return ImageEncoder(self.model.image_encoder, self.model.processor)

    def coefficients(self, a: np.ndarray, a2: np.ndarray, b: np.ndarray) -> Mix:
        """The mix that the router chooses for one analogy. UserError without a basis, or with an internal query, whose
        coefficients depend on each layer's input."""
        [images] = _told_if_stretched(as_analogies([(a, a2, b)]))
        coefficients = {path: to_host(c[:, 0]) for path, c in self._coefficients([images]).items()}
        return Mix(coefficients, self.model.basis.fingerprint())

    def mix(self, which: int | str | Mapping[str, Any]) -> Mix:
        """A mix of the attached basis: a member by its index, a row of `BasisConfig.table` by its name, or given
        coefficients {path: c [l, n]}.

        Raises UserError without a basis, and for what doesn't fit it.
        """
        return self._basis().mix(which)

    def edit(
        self,
        a: np.ndarray,
        a2: np.ndarray,
        b: np.ndarray,
        prompt: str = "",
        *,
        steps: int = 28,
        guidance: float = 2.5,
        seed: int = 0,
        max_size: int | None = None,
        folded: bool | None = None,
        mix: Mix | None = None,
        round_to_bfloat16: bool = False,
    ) -> np.ndarray:
        """b′, such that a : a′ :: b : b′. One image uint8, of the size of a (or of max_size's quadrant).

        prompt: what the edit is, in words; may be empty. max_size: longest edge of the whole grid, pixels.
        folded: fold the mix into the weights (every step then costs what the base costs) or apply it beside them;
        None folds wherever coefficients are known beforehand and the base isn't quantised. mix: in the place of what
        the router chooses, such as `0.5 * (mix_1 + mix_2)` of two analogies' `coefficients`. round_to_bfloat16: see
        transformer.embeddings.
        """
        return self.edit_batch(
            [(a, a2, b)],
            [prompt],
            steps=steps,
            guidance=guidance,
            seed=seed,
            max_size=max_size,
            folded=folded,
            mix=mix,
            round_to_bfloat16=round_to_bfloat16,
        )[0]

    def edit_batch(
        self,
        conditions: list[Images],
        prompts: list[str],
        *,
        steps: int = 28,
        guidance: float = 2.5,
        seed: int = 0,
        max_size: int | None = None,
        folded: bool | None = None,
        use_basis: bool = True,
        mix: Mix | None = None,
        round_to_bfloat16: bool = False,
        noise: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """b′ of several analogies (a, a′, b) at once; their grids must have one size. See `edit`.

        The noise of the i-th analogy depends on the seed and i alone, unless `noise` [b, s, c] gives it, in packed
        latents (diffusers' `latents`). use_basis False leaves the basis out. `mix` serves all of them.
        Raises UserError for arguments of another kind or range, and where the result is not finite, with the place.
        """
        steps, guidance = as_value(steps, "steps", SAMPLING_STEPS), as_value(guidance, "guidance", GUIDANCE)
        if max_size is not None:
            max_size = as_value(max_size, "max_size", MAX_SIZE)
        if folded is not None:
            folded = as_value(folded, "folded", Flag())
        key = random_key(seed)
        conditions = as_analogies(conditions)
        prompts = as_prompts(prompts, len(conditions))
        grids = [fit_to_model(condition_grid(*images, max_size)) for images in conditions]
        if note := next((note for _, note in grids if note), None):
            say(note)
        _told_if_stretched(conditions)
        sizes = {grid.shape[:2] for grid, _ in grids}
        if len(sizes) > 1:
            raise UserError(
                f"the analogies give grids of different sizes {sorted(sizes)}; edit them one by one, or "
                "resize the first images alike"
            )
        size = sizes.pop()
        batch, model = len(grids), self.model
        if noise is not None:
            noise = self._noise(noise, batch, size)
        adapters = self._adapters(conditions, mix) if use_basis and model.basis is not None else None
        if adapters:
            foldable = batch == 1 and (mix is not None or model.basis.config.coefficients.in_advance)
            if folded and not foldable:
                raise UserError(
                    "a mix can be folded into the weights for one analogy whose coefficients don't depend "
                    "on the layers' inputs; leave folding out"
                )
            if folded or (folded is None and foldable and can_fold(model.transformer)):
                model, adapters = _with(model, transformer=_fold(model.transformer, adapters)), None
        text, pooled = self.prompt(prompts)
        condition = _encode(model, jnp.asarray(np.stack([grid for grid, _ in grids])))
        if noise is None:
            noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), condition.shape[1:]) for i in range(batch)])
        noise = jnp.asarray(noise)
        sigmas = self.folder.schedule.sigmas(steps, condition.shape[1])
        tokens = _sample(
            model,
            size,
            bool(round_to_bfloat16),
            noise,
            condition,
            text,
            pooled,
            jnp.float32(guidance),
            jnp.asarray(sigmas),
            adapters,
        )
        decoded = _decode(model, size, tokens)
        _require_finite(
            {
                "the text's embedding": text,
                "the text's pooled embedding": pooled,
                "the latents of a, a2 and b": condition,
                "the latents after sampling": tokens,
                "the decoded image": decoded,
            }
        )
        return [bottom_right(image) for image in to_uint8(decoded)]

    def save_basis(self, path: str | Path, dtype: str = "float16") -> None:
        """The attached basis in the published format: `path` (.safetensors) and config.yaml beside it.

        Where there are several processes all call this, and process 0 writes. Raises UserError for another suffix or
        dtype, numbers that are not finite in it, and where the files can't be written.
        """
        basis, path, dtype = self._basis(), self._target(path), _dtype(dtype)
        arrays = _arrays(basis)
        if jax.process_index() == 0:
            with told_if_unwritable(path):
                write_basis(path, basis.config, arrays, dtype)

    def save_lora(
        self,
        path: str | Path,
        mix: Mix,
        *,
        rank: int | None = None,
        dtype: str = "float32",
        alpha: bool | float = False,
        names: str = "diffusers",
    ) -> TruncationError | None:
        """One mix as an ordinary LoRA that diffusers reads, of rank n·r, or of a lower `rank` by SVD.

        Returns the error of the lower rank, relative to the update's norm (None at full rank). alpha, names: see
        lora_file.write_lora. Raises UserError for a mix of another basis, another suffix, rank, dtype, alpha or
        names, numbers that are not finite in the dtype, and where the file can't be written.
        """
        basis, error, path, dtype = self._basis(), None, self._target(path), _dtype(dtype)
        coefficients = basis.own(mix).coefficients
        if rank is not None:
            rank = as_value(rank, "the rank", RANK)
        names = as_value(names, "names", Choice(NAMES))
        alpha = alpha if isinstance(alpha, bool) else as_value(alpha, "alpha", _ALPHA)
        factors = mixed_factors(_arrays(basis), coefficients, basis.config.scale)
        if rank is not None:
            factors, error = truncate(factors, rank)
        with told_if_unwritable(path):
            write_lora(path, factors, dtype, alpha, names, block_linears(self.folder.flux_config))
        return error

    def _basis(self) -> Basis:
        if self.model.basis is None:
            raise UserError("no basis is attached to this pipeline; call attach first")
        return self.model.basis

    def _coefficients(self, conditions: list[Images]) -> dict[str, jax.Array]:
        basis = self._basis()
        if not basis.config.coefficients.in_advance:
            raise UserError(
                "this basis routes by an internal query: its coefficients depend on each layer's input "
                "and can't be computed beforehand; edit without folding"
            )
        query = self._query(conditions) if basis.config.coefficients.from_images else None
        found = basis.coefficients(query, len(conditions))
        for path, bad in jax.device_get(_not_finite(found)).items():
            if bad:
                raise UserError(
                    f"the router's coefficients of {path} hold not-a-number or infinity; check the basis and "
                    "the image encoder's weights"
                )
        return found

    def _adapters(self, conditions: list[Images], mix: Mix | None) -> dict[str, Adapter]:
        basis = self._basis()
        if mix is not None:
            return basis.adapters(
                {path: jnp.repeat(c[:, None], len(conditions), 1) for path, c in basis.own(mix).coefficients.items()}
            )
        return basis.adapters(self._coefficients(conditions) if basis.config.coefficients.in_advance else None)

    def _target(self, path: Any) -> Path:
        """A .safetensors file to write, which may replace another one but not what the basis was read from."""
        path = as_path(path, "the file", ".safetensors")
        require_free(path, [self.source] if self.source else [], overwrite=True)
        return path

    def _noise(self, noise: Any, batch: int, size: tuple[int, int]) -> np.ndarray:
        """Packed latents [b, s, c] for grids of `size` = (height, width), as float32; UserError for anything else."""
        vae = self.folder.vae_config
        shape = (batch, size[0] * size[1] // (2 * vae.downscale) ** 2, 4 * vae.latent_channels)
        try:
            noise = np.asarray(noise)
            found = f"{list(noise.shape)} of {noise.dtype}"
        except ValueError as error:  # rows of unequal length
            raise UserError(f"the noise is no array ({error}); give numbers {list(shape)}, or leave it out") from None
        if noise.shape != shape or noise.dtype.kind not in "fiu":
            raise UserError(
                f"the noise is {found}, numbers {list(shape)} were expected; give packed latents [b, s, c], "
                "or leave it out"
            )
        require_finite(noise, "the noise", "give finite numbers")
        return noise.astype(np.float32)


def _dtype(given: Any) -> jnp.dtype:
    """A floating-point dtype that weights are kept or stored in; UserError for everything else."""
    try:
        name = jnp.dtype(given).name if given is not None else None
    except TypeError:
        name = given
    return jnp.dtype(as_value(name, "the dtype", _DTYPES))


def _told_if_stretched(analogies: list[Images]) -> list[Images]:
    for sentence in stretched(analogies):
        say(sentence)
    return analogies


@jax.jit
def _not_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: ~jnp.isfinite(array).all() for name, array in arrays.items()}


def _require_finite(places: dict[str, jax.Array]) -> None:
    """UserError that names the first of the places, in the order of computation, whose numbers are not all finite."""
    bad = jax.device_get(_not_finite(places))
    for place in places:
        if bad[place]:
            raise UserError(
                f"there is no result: {place} holds not-a-number or infinity; check the weights of the "
                "pipeline and the basis, give smaller coefficients, or compute in float32"
            )


def _arrays(basis: Basis) -> dict[str, dict[str, np.ndarray]]:
    return {path: {name: to_host(array) for name, array in parts.items()} for path, parts in basis.to_arrays().items()}


def _with(model: AnalogyModel, **parts: nnx.Module) -> AnalogyModel:
    """The model with other parts; the rest is shared."""
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder", "basis", "processor", "dtype")
    return AnalogyModel(**({name: getattr(model, name) for name in names} | parts))


_fold = nnx.jit(fold)


@nnx.jit
def _query(model: AnalogyModel, views: jax.Array) -> jax.Array:
    return model.query(views)


@nnx.jit
def _prompt(model: AnalogyModel, clip_ids: jax.Array, t5_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.prompt(clip_ids, t5_ids)


@nnx.jit
def _encode(model: AnalogyModel, images: jax.Array) -> jax.Array:
    return model.tokens(images)


@functools.partial(nnx.jit, static_argnums=(1, 2))
def _sample(
    model: AnalogyModel, size, round_to_bfloat16, noise, condition, text, pooled, guidance, sigmas, adapters
) -> jax.Array:
    return model.sample(
        noise, condition, text, pooled, guidance, sigmas, size, adapters, round_to_bfloat16=round_to_bfloat16
    )


@functools.partial(nnx.jit, static_argnums=1)
def _decode(model: AnalogyModel, size, tokens) -> jax.Array:
    return model.images(tokens, *size)
