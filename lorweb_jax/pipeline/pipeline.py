"""The public interface: load a pipeline, attach a basis, edit.

from lorweb_jax import Pipeline, read_image, write_image
pipeline = Pipeline.load("assets/small_kontext").attach("runs/basis")
a, a2, b = (read_image(f"{name}.png") for name in ("a", "a2", "b"))
result = pipeline.edit(a, a2, b, prompt="put a frame around it", seed=0)
write_image("result.png", result)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.adapters.append import append
from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.fold import can_fold
from lorweb_jax.adapters.formats.basis_file import require_fits
from lorweb_jax.adapters.formats.lora_file import TruncationError
from lorweb_jax.adapters.formats.mix_file import SavedMix, read_mix, require_basis
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.images.fit import STRETCH
from lorweb_jax.images.grid import condition_grid, stretched
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.encoder import ImageEncoder
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline import adapting, devices, loading, saving
from lorweb_jax.pipeline.adapters import load_basis
from lorweb_jax.pipeline.arguments import MAX_SIZE, Images, Pair, as_analogies, as_pairs, as_path, as_prompts
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.pipeline.request import edit_request, generation_request
from lorweb_jax.pipeline.sampling import Embeddings, encode_prompt, encode_query, not_finite
from lorweb_jax.pipeline.session import Session
from lorweb_jax.pipeline.styles import (
    STRENGTH_DEFAULT,
    Style,
    as_styles,
    load_style,
    require_run,
    unique_names,
    weighted,
    with_defaults,
)
from lorweb_jax.settings.rules import ADAPTATION_RATE, SAMPLING_STEPS, SEED, STRENGTH, Flag, as_value


class Pipeline:
    """A FLUX Kontext pipeline with, optionally, a basis of LoRAs. Images are uint8 [H, W, 3].

    `**sampling` of a method are the fields of `request.Sampling`: steps, guidance, seed, true_guidance,
    negative_prompt, noise, callback and so on.
    """

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
        unstacked: bool = False,
        offload: str = "none",
        mesh: Mapping[str, int] | None = None,
    ) -> "Pipeline":
        """From a folder in diffusers' layout.

        image_encoder: the router's image encoder (CLIP ViT-L/14 or SigLIP2 folder); default `folder`/clip_vision.
        dtype: what weights of transformer and text encoders are kept and computed in. attention, quantization: see
        Flux; nothing is folded into a quantised transformer. unstacked: each block has arrays of its own, from which
        steps on CPUs and GPUs are faster; each block is compiled, which takes longer. offload: "blocks" leaves
        the kernels of the transformer's and T5's blocks in the host's memory, from where they are streamed block by
        block in every step; nothing is folded into them. mesh: sizes of the axes of a mesh of this process's devices,
        which share the model, such as {"sequence": 4} or {"tensor": 2, "sequence": 4} (nn/sharding.py); None for the
        first device alone. XLA_FLAGS gets what suits this machine's devices, unless it says otherwise
        (processes/compiler_flags.py); jax reads it as it starts.
        Raises UserError for missing, truncated, damaged or foreign files, with the difference where keys don't match,
        and for weights that are not finite.
        """
        return cls(
            *loading.load(
                folder,
                image_encoder,
                dtype=dtype,
                attention=attention,
                quantization=quantization,
                unstacked=unstacked,
                offload=offload,
                mesh=mesh,
            )
        )

    def attach(self, basis: Basis | str | Path, config: str | Path | None = None) -> "Pipeline":
        """A pipeline with this basis: a Basis, a run's folder, a published basis, or an ordinary LoRA's file.

        config: the published basis's config.yaml, where it doesn't lie beside it. Weights are shared, not copied.
        Raises UserError for a basis that doesn't fit the transformer or the image encoder.
        """
        layers, source = self.folder.backbone.adapted, None
        if isinstance(basis, Basis):
            require_fits(basis.to_arrays(), layers, "the basis")
        else:
            config = None if config is None else as_path(config, "the basis's config")
            source = as_path(basis, "the basis")
            basis = Basis.from_arrays(*load_basis(source, layers, config))
        self.folder.complete(basis.config, self.model.image_encoder)
        self.folder.require_encoder(basis.config)
        return self._with(basis, source)

    def append(self, styles: Style | Sequence[Style]) -> "Pipeline":
        """A pipeline whose basis has these styles as members beside its own, by their names and at their weights.

        The router's coefficients stay as they are, and the new members have none until a mix gives them one:
        `pipeline.coefficients(a, a2, b) + 0.8 * pipeline.mix("ink")`. Raises UserError without a basis, for a name that
        it has already, and for a basis with an internal query, which takes no mix.
        """
        basis, layers = self._basis(), self.folder.backbone.adapted
        styles = as_styles(styles)
        members = dict(zip(unique_names([style.name for style in styles]), map(weighted, styles)))
        arrays = append(basis.config, saving.arrays_of(basis), members, layers)
        return self._with(Basis.from_arrays(*arrays), self.source)

    def query(self, conditions: list[Images]) -> jax.Array:
        """The external query [b, q] of analogies (a, a′, b), each at its own size."""
        self._basis()
        return self._query(as_analogies(conditions))

    def prompt(self, texts: list[str]) -> tuple[jax.Array, jax.Array]:
        """Instructions -> text [b, t, j] and pooled [b, p]. Says so where an encoder doesn't take all of one."""
        texts = as_prompts(texts)
        if self.model.text_encoder_2 is None and self.precomputed:
            return tuple(map(jnp.asarray, self.precomputed.prompt(texts)))
        self.folder.tell_left_out(texts, "prompt")
        return encode_prompt(self.model, *self.folder.token_ids(texts))

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The router's image encoder, if there is one."""
        if self.model.image_encoder is None:
            return self.precomputed.image_encoder if self.precomputed else None
        return ImageEncoder(self.model.image_encoder, self.model.processor)

    def coefficients(self, a: np.ndarray, a2: np.ndarray, b: np.ndarray, *, more_pairs: Sequence[Pair] = ()) -> Mix:
        """The mix that the router chooses for one analogy; with `more_pairs` (a, a′) of the same edit, the mean of what
        it chooses for each pair with b. UserError without a basis, or with an internal query, whose coefficients depend
        on each layer's input."""
        [images] = as_analogies([(a, a2, b)])
        for sentence in stretched([images, *((*pair, images[2]) for pair in as_pairs(more_pairs))]):
            say(sentence)
        return self.coefficients_batch([images], more_pairs=more_pairs)[0]

    def coefficients_batch(self, conditions: Sequence[Images], *, more_pairs: Sequence[Pair] = ()) -> list[Mix]:
        """The `coefficients` of several analogies (a, a′, b), all with the same further pairs."""
        conditions, more = as_analogies(conditions), as_pairs(more_pairs)
        rows = [(*pair, b) for a, a2, b in conditions for pair in [(a, a2), *more]]
        chosen = {path: to_host(c) for path, c in self._coefficients(rows).items()}
        # [l, b·pairs, n] -> the mean over pairs; of a LoRA there is one row, whatever the images.
        means = {
            path: c.reshape(c.shape[0], -1, 1 + len(more), c.shape[2]).mean(2) if c.shape[1] > 1 else c
            for path, c in chosen.items()
        }
        own = self.model.basis.fingerprint()
        return [
            Mix({path: c[:, min(i, c.shape[1] - 1)] for path, c in means.items()}, own) for i in range(len(conditions))
        ]

    def mix(self, which: int | str | Mapping[str, Any]) -> Mix:
        """A mix of the attached basis: a member by its index, a row of `BasisConfig.table` or an appended style by its
        name, or given coefficients {path: c [l, n]}.

        Raises UserError without a basis, and for what doesn't fit it.
        """
        return self._basis().mix(which)

    def adapt(
        self,
        a: np.ndarray,
        a2: np.ndarray,
        b: np.ndarray,
        prompt: str = "",
        *,
        steps: int = adapting.STEPS,
        rate: float = adapting.RATE,
        seed: int = 0,
        max_size: int | None = None,
        mix: Mix | None = None,
        callback: Callable[[int], object] | None = None,
    ) -> Mix:
        """The `coefficients` of an analogy, or `mix`, fitted to its one pair: `steps` of Adam at `rate` on the training
        loss of a : a′ :: a : a′ with the prompt, all weights frozen.

        It needs the memory of sampling, and of each block's input for the backward pass. steps: 1 to 1000. rate: above
        0, at most 10. seed: of noise and noise levels. max_size: as in `edit`. callback: called with each step's number
        as it ends; what it raises ends the adaptation. Raises UserError as `coefficients` does, and where the
        coefficients become infinite.
        """
        steps, rate = as_value(steps, "steps", SAMPLING_STEPS), float(as_value(rate, "rate", ADAPTATION_RATE))
        seed = as_value(seed, "seed", SEED)
        if max_size is not None:
            max_size = as_value(max_size, "max_size", MAX_SIZE)
        [(a, a2, b)], prompts = as_analogies([(a, a2, b)]), as_prompts([prompt])
        basis = self._basis()
        start = self.coefficients_batch([(a, a2, b)])[0] if mix is None else basis.own(mix)
        c = adapting.adapted(
            self,
            [(a, a2)],
            prompts,
            [seed],
            {path: jnp.asarray(c)[:, None] for path, c in start.coefficients.items()},
            steps,
            rate,
            max_size,
            remat=True,
            callback=callback,
        )
        return Mix({path: each[:, 0] for path, each in c.items()}, start.basis)

    def save_mix(
        self, path: str | Path, mix: Mix, *, prompt: str = "", pictures: Sequence[tuple[str, str]] = ()
    ) -> None:
        """A mix of the attached basis as a file (`path` .safetensors), for `load_mix` and `edit --mix`.

        prompt: the instruction that it goes with. pictures: names of the example pairs (a, a′). Both are kept as they
        are. Raises UserError for a mix of another basis, another suffix, and where the file can't be written.
        """
        saving.save_mix(self._basis(), path, mix, self.source, prompt, pictures)

    def load_mix(self, path: str | Path) -> SavedMix:
        """(mix, prompt, pictures) of a file that `save_mix` or `edit --save-mix` wrote. UserError for a file of another
        kind, and for a mix of another basis than the attached one."""
        basis, saved = self._basis(), read_mix(as_path(path, "the mix"))
        require_basis(path, saved.mix, basis.fingerprint())
        return saved._replace(mix=basis.own(saved.mix))

    def edit(
        self,
        a: np.ndarray,
        a2: np.ndarray,
        b: np.ndarray,
        prompt: str = "",
        *,
        max_size: int | None = None,
        folded: bool | None = None,
        mix: Mix | None = None,
        strength: float = 1.0,
        more_pairs: Sequence[Pair] = (),
        fit: str = STRETCH,
        **sampling,
    ) -> np.ndarray:
        """b′, such that a : a′ :: b : b′. One image uint8, of the size of a (or of max_size's quadrant).

        fit: "stretch" gives a b of other proportions a's, as published. "restore" stretches the result back, "pad"
        repeats b's border outwards until it has a's proportions and takes that part off the result, "crop" edits the
        middle of b that has them; these three give an image of b's size.

        prompt: what the edit is, in words; may be empty. max_size: longest edge of the whole grid, pixels.
        folded: fold the mix into a copy of the weights, which is held meanwhile (every step then costs what the base
        costs), or apply it beside them; None folds wherever coefficients are known beforehand and the base isn't
        quantised. mix: in the place of what the router chooses, such as `0.5 * (mix_1 + mix_2)` of two analogies'
        `coefficients`. strength: what the coefficients, hence the update of the weights, are multiplied by, −1000 to
        1000: 0 is the base by itself. more_pairs: further examples (a, a′) of the same edit; the mix is then the mean
        of what the router chooses for each, and the model is shown the first alone. To make several images with one
        mix, open a `session`.
        """
        options = {"max_size": max_size, "folded": folded, "mix": mix, "strength": strength, "more_pairs": more_pairs}
        return self.edit_batch([(a, a2, b)], [prompt], fit=fit, **options, **sampling)[0]

    def edit_batch(
        self,
        conditions: list[Images],
        prompts: list[str],
        *,
        max_size: int | None = None,
        folded: bool | None = None,
        use_basis: bool = True,
        mix: Mix | Sequence[Mix] | None = None,
        strength: float = 1.0,
        more_pairs: Sequence[Pair] = (),
        fit: str = STRETCH,
        styles: Style | Sequence[Style] = (),
        **sampling,
    ) -> list[np.ndarray]:
        """b′ of several analogies (a, a′, b) at once; their grids must have one size. See `edit`.

        use_basis False leaves the basis out. `mix` serves all of them, or there is one for each; without it each has
        its router's coefficients. Several mixes are not folded. strength, more_pairs, fit: of all of them. styles:
        guide all of them (see `session`).
        Raises UserError for arguments of another kind or range, and where the result is not finite, with the place.
        """
        styles = as_styles(styles)
        sampling = with_defaults(sampling, styles)
        conditions, request = edit_request(self.folder, conditions, prompts, sampling, max_size, fit)
        if folded is None and len(conditions) > 1:
            folded = False
        if more_pairs := as_pairs(more_pairs):
            if mix is not None:
                raise UserError("more_pairs are for the router to choose by, and a mix was given; leave out either")
            mix = self.coefficients_batch(conditions, more_pairs=more_pairs)
        with self._open(conditions, mix, folded, use_basis, styles, strength) as session:
            return session.edited(request)

    def generate(
        self,
        prompt: str,
        image: np.ndarray | Sequence[np.ndarray] | None = None,
        *,
        size: tuple[int, int] | None = None,
        max_size: int | None = None,
        **sampling,
    ) -> np.ndarray:
        """One image uint8 from a text, or by an instruction from a reference image: Kontext's own use, without a grid.

        image: the picture to edit, or several references, which the model sees as images 1, 2, … of a sequence (FLUX.1
        Kontext [dev] was trained with one). size: (width, height) of the result, multiples of 16; by default that of
        the first reference, or the size that the autoencoder was trained at. max_size: longest edge of a reference,
        pixels. An attached LoRA takes part; a basis with a router needs a mix, hence a `session`.
        """
        images = None if image is None else [image]
        return self.generate_batch([prompt], images, size=size, max_size=max_size, **sampling)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[np.ndarray | Sequence[np.ndarray]] | None = None,
        *,
        size: tuple[int, int] | None = None,
        max_size: int | None = None,
        **sampling,
    ) -> list[np.ndarray]:
        """One image for each prompt, all at once. images: for each a reference or a sequence of them, as many and of
        the same sizes for all. See `generate`. Raises UserError as `edit_batch` does."""
        request = generation_request(self.folder, prompts, images, with_defaults(sampling, ()), size, max_size)
        with self.session() as session:
            return session.generated(request)

    def style(
        self,
        source: Mix | str | Path,
        strength: float = STRENGTH_DEFAULT,
        words: str | None = None,
        *,
        name: str | None = None,
        weight: float = 1.0,
        step: int | None = None,
    ) -> Style:
        """A style for `stylize` and `session`: of a run of configs/pair.py, a published style file (or the folder that
        it lies in), or the file of any ordinary LoRA.

        source: or a mix of the attached basis, such as an analogy's `coefficients`; guidance then multiplies what the
        analogy changes. words: what follows the prompt in the style's own pass; a run knows its own. strength, weight,
        name: see Style. step: which checkpoint of a run; by default the newest.
        Raises UserError for a file of another kind or of another model, and for one that is called content….
        """
        layers = self.folder.backbone.adapted
        if isinstance(source, Mix):
            return Style(saving.mix_as_member(self._basis(), source), name or "mix", strength, words or "", weight)
        path = as_path(source, "the style")
        require_run(step, [path])
        return load_style(path, layers, strength, words, name=name, weight=weight, step=step)

    def stylize(
        self,
        prompt: str,
        styles: Style | Sequence[Style],
        image: np.ndarray | Sequence[np.ndarray] | None = None,
        *,
        size: tuple[int, int] | None = None,
        max_size: int | None = None,
        **sampling,
    ) -> np.ndarray:
        """One image uint8 from a text, or from a text and a reference image, by style guidance (method.md §7).

        styles: of `style`, one or several, which add up. size: (width, height); by default that of the reference, or
        512 pixels a side where the autoencoder was trained at so many. Defaults of the sampling are 50 steps, guidance
        1, true_guidance 4, and styles from a fifth of the steps on. To make several images, open a `session` with
        styles. Raises UserError as `edit_batch` does.
        """
        if not (styles := as_styles(styles)):
            raise UserError("no style was given; give one of `Pipeline.style`, or draw without one by `generate`")
        with self.session(styles=styles) as session:
            return session.generate(prompt, image, size=size, max_size=max_size, **sampling)

    def session(
        self,
        mix: Mix | None = None,
        *,
        folded: bool | None = None,
        use_basis: bool = True,
        styles: Style | Sequence[Style] = (),
    ) -> Session:
        """A session that makes images with one mix, such as `coefficients` of an analogy; see Session for its memory.

        mix None: all of a LoRA, the first row of a table, or what the layers' inputs choose; the base alone where no
        basis is attached or use_basis is False. folded: as in `edit`. styles: guide all that the session makes, over
        the base with the mix (method.md §7); its sampling then has the defaults of `stylize`. Raises UserError for a
        mix of another basis, and without a mix for a basis whose router asks for an analogy.
        """
        return self._open([], mix, folded, use_basis, as_styles(styles))

    def save_basis(self, path: str | Path, dtype: str = "float16") -> None:
        """The attached basis in the published format: `path` (.safetensors) and config.yaml beside it.

        Where there are several processes all call this, and process 0 writes. Raises UserError for another suffix or
        dtype, numbers that are not finite in it, and where the files can't be written.
        """
        saving.save_basis(self._basis(), path, self.source, dtype)

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
        basis, layers = self._basis(), self.folder.backbone.adapted
        return saving.save_lora(basis, mix, layers, path, self.source, rank=rank, dtype=dtype, alpha=alpha, names=names)

    def save_style(
        self,
        path: str | Path,
        styles: Style | Sequence[Style],
        *,
        names: str = "diffusers",
        rank: int | None = None,
        dtype: str = "float32",
        alpha: bool | float = False,
    ) -> TruncationError | None:
        """A style, or several summed at their weights, as an ordinary LoRA, or with names "published" in the format of
        Pair Customization.

        Options, result and errors are those of `save_lora`; the published format takes no rank and no alpha, and holds
        an adapter only whose q, k and v share an A. An earlier result is replaced, a file that one of the styles was
        read from never.
        """
        styles = as_styles(styles)
        inputs = [source for source in (self.source, *(style.source for style in styles)) if source]
        layers = self.folder.backbone.adapted
        return saving.save_styles(styles, layers, path, inputs, names=names, rank=rank, dtype=dtype, alpha=alpha)

    def _open(
        self,
        conditions: list[Images],
        mix: Mix | Sequence[Mix] | None,
        folded: bool | None,
        use_basis: bool,
        styles: Sequence[Style] = (),
        strength: float = 1.0,
    ) -> Session:
        """A session for these analogies, or for any where the mix doesn't depend on them."""
        strength = as_value(strength, "strength", STRENGTH)
        if folded is not None:
            folded = as_value(folded, "folded", Flag())
        if mix is not None and not use_basis:
            raise UserError("a mix was given, and use_basis is False; leave one of them out")
        basis = self.model.basis if use_basis else None
        if mix is not None:
            basis = self._basis()
            mixes = [basis.own(each) for each in (mix if isinstance(mix, Sequence) else [mix])]
            if len(mixes) not in (1, len(conditions)):
                raise UserError(f"{len(mixes)} mixes were given for {len(conditions)} analogies; give one, or one each")
            coefficients = {
                path: jnp.stack([jnp.asarray(each.coefficients[path]) for each in mixes], 1)
                for path in mixes[0].coefficients
            }
        elif basis is None or not basis.config.coefficients.in_advance:
            coefficients = None
        elif conditions or not basis.config.coefficients.from_images:
            coefficients = self._coefficients(conditions)
        else:
            raise UserError(
                "this basis chooses its mix by an analogy; edit one (a, a2, b), open a session with a mix such as "
                "pipeline.coefficients(a, a2, b), or leave the basis out"
            )
        if strength != 1:
            if coefficients is None:
                raise UserError(
                    "strength multiplies coefficients, and here there are none beforehand: no basis takes part, or its "
                    "layers choose by their own input; leave it out"
                )
            coefficients = {path: strength * c for path, c in coefficients.items()}
        one = coefficients is not None and all(c.shape[1] == 1 for c in coefficients.values())
        if folded and basis is not None and not one:
            raise UserError(
                "a mix can be folded into the weights for one analogy whose coefficients don't depend "
                "on the layers' inputs; leave folding out"
            )
        fold = one and (folded or (folded is None and can_fold(self.model.transformer)))
        return Session(self, basis, coefficients, fold, styles)

    def _with(self, basis: Basis, source: Path | None) -> "Pipeline":
        basis = devices.spread(basis, devices.mesh_of(self.model.transformer))
        return Pipeline(self.folder, self.model.replace(basis=basis), self.precomputed, source)

    def _basis(self) -> Basis:
        if self.model.basis is None:
            raise UserError("no basis is attached to this pipeline; call attach first")
        return self.model.basis

    def _query(self, conditions: list[Images]) -> jax.Array:
        grids = [condition_grid(*images) for images in conditions]
        if self.model.image_encoder is None and self.precomputed:
            return jnp.asarray(self.precomputed.query(grids))
        mode = self.model.basis.config.query_mode
        return encode_query(self.model, queries.views(mode, grids, self.folder.encoder.processor))

    def _coefficients(self, conditions: list[Images]) -> dict[str, jax.Array]:
        """{path: c [l, b, n]} of analogies; b = 1 where they don't depend on these."""
        basis = self._basis()
        if not basis.config.coefficients.in_advance:
            raise UserError(
                "this basis routes by an internal query: its coefficients depend on each layer's input "
                "and can't be computed beforehand; edit without folding"
            )
        coefficients = basis.coefficients(self._query(conditions) if basis.config.coefficients.from_images else None)
        for path, bad in jax.device_get(not_finite(coefficients)).items():
            if bad:
                raise UserError(
                    f"the router's coefficients of {path} hold not-a-number or infinity; check the basis and "
                    "the image encoder's weights"
                )
        return coefficients
