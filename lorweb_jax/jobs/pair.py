"""Pair Customization: trains a content and a style adapter on one image and its stylised version (method.md §7).

A step has two passes over a frozen FLUX pipeline, at the same noise and time: the content image with the content
adapter alone, then, once the style phase has begun, the stylised image with both, whose gradient goes to the style
adapter alone. Text encoders are needed at the start only, for the captions.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import BasisParam
from lorweb_jax.adapters.formats.pair_file import write_member
from lorweb_jax.adapters.members import trained_part
from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.data.pair import Augmentation, read_images
from lorweb_jax.flow.loss import weighted_mse
from lorweb_jax.flow.schedule import pair_times
from lorweb_jax.images.levels import to_uint8
from lorweb_jax.images.pictures import sheet
from lorweb_jax.nn import quantization
from lorweb_jax.nn.attention import choose
from lorweb_jax.nn.layers import in_turn
from lorweb_jax.pipeline import pair_run
from lorweb_jax.pipeline.folder import PARTS, PipelineFolder
from lorweb_jax.pipeline.model import Size
from lorweb_jax.pipeline.pair_model import PASSES, PairModel
from lorweb_jax.precomputed.encoder import SharedEncoder
from lorweb_jax.precomputed.scope import TEXT_ENCODERS
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.settings.texts import as_text
from lorweb_jax.training.job import Job, NumberedBatches, Phase


def make(config) -> "PairJob":
    return PairJob(config)


class Draws(NamedTuple):
    """What a step draws for both passes: time t [b] in 0..1, noise [b, h, w, c], and the noise of each image's
    posterior [2, b, h, w, c]."""

    time: jax.Array
    noise: jax.Array
    posterior: jax.Array


def draw(key: jax.Array, shape: tuple[int, ...], times: str) -> Draws:
    """Draws for latents [b, 2, h, w, c]. times: "batch" draws one t for all examples, "example" one for each."""
    b, images, *each = shape
    time_key, noise_key, posterior_key = jax.random.split(key, 3)
    levels = jnp.asarray(pair_times())
    index = jax.random.randint(time_key, (b,) if times == "example" else (1,), 0, len(levels))
    return Draws(
        jnp.broadcast_to(levels[index], (b,)),
        jax.random.normal(noise_key, (b, *each), jnp.float32),
        jax.random.normal(posterior_key, (images, b, *each), jnp.float32),
    )


class PairBatches(NumberedBatches):
    """The images, in draws of (seed, number of the batch) where they are augmented: "images" float32
    [b, 2 or 3, h, w, 3] in −1..1, content, style and the condition if there is one. One batch has one ratio, so that
    its micro-batches have one size."""

    def __init__(self, augmentation: Augmentation, config):
        self.augmentation, self.config = augmentation, config

    def at(self, number: int) -> dict[str, np.ndarray]:
        batch = self.config.train.batch
        if self.config.data.augment:
            rng = np.random.default_rng((self.config.seed, number))
            return {"images": self.augmentation.drawn(rng, batch)}
        return {"images": np.repeat(self.augmentation.plain()[None], batch, axis=0)}


class PairJob(Job):
    """See training/job.py for what each method is for."""

    trainable = BasisParam

    def __init__(self, config):
        self.config = config
        quantization.check(config.quantization)
        self.folder = PipelineFolder(config.pipeline)
        self.joint = config.pair.joint
        data = config.data
        names = [data.content, data.style, *filter(None, [data.condition])]
        self.images = read_images(names, data.cache, data.long_edge)
        self.augmentation = Augmentation(self.images, data.long_edge)
        self.shape = self.augmentation.plain().shape[1:3]  # without a draw; refuses images that are too narrow
        if data.augment:
            self.augmentation.require_drawable()
        if np.array_equal(*self.images[:2]):
            raise UserError(
                f"{data.content} and {data.style} are the same picture, from which no style can be learned; give its "
                "stylised version as config.data.style"
            )
        words = pair_run.Words(*(as_text(text, "the caption") for text in (data.caption, data.style_words)))
        self.captions = {"content": words.content, "style": words.stylised}
        prompts = [as_text(prompt, "the prompt") for prompt in config.evaluation.prompts]
        self.prompts = [(prompt, f"{prompt} {words.style}") for prompt in prompts]
        self.embedded: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # text -> text [t, j], pooled [p]
        # As shapes; refuses lists and ranks that don't fit the model.
        self.members = nnx.eval_shape(lambda: pair_run.make_members(config.pair, self.folder.backbone.adapted))
        if "style" not in self.members.names:
            say(
                "config.pair has the style on no block, so that this run learns the content alone and leaves no style; "
                "give config.pair.double_style or single_style blocks to learn one"
            )

    def sources(self) -> dict[str, str]:
        names = ("data.content", "data.style", "data.condition")
        return {
            "pipeline": fingerprint.of_folders(self.folder.folder / part for part in PARTS),
            **{name: fingerprint.of_image(image) for name, image in zip(names, self.images)},
        }

    @property
    def tokens(self) -> int:
        """Image tokens of an example that isn't augmented: noisy ones, and as many of the condition's."""
        height, width = self.shape
        patch = self.folder.backbone.latents.patch * self.folder.vae_config.downscale
        return height * width // patch**2 * (2 if self.config.data.condition else 1)

    @functools.cached_property
    def attention(self) -> str:
        """The implementation that config.attention selects; "auto" by the shape of one device's share of a step."""
        config, flux = self.config, self.folder.flux_config
        shape = (1, self.tokens + self.folder.text_tokens, flux.num_attention_heads, flux.attention_head_dim)
        return choose(config.attention, shape, jnp.dtype(config.compute_dtype), backward=True)

    @property
    def attention_heads(self) -> list[int]:
        return [self.folder.backbone.heads]

    @property
    def sequences(self) -> list[int]:
        return [self.tokens, self.tokens + self.folder.text_tokens]

    @property
    def offloaded(self) -> Sequence[str]:
        return self.folder.stacks if self.config.offload == "blocks" else ()

    def build(self, rngs: nnx.Rngs) -> PairModel:
        config, flux = self.config, self.folder.flux_config
        base = self.folder.make(
            rngs,
            dtype=config.compute_dtype,
            remat=config.remat,
            attention=self.attention,
            unroll=config.unroll,
            quantization=config.quantization,
            parts=("transformer", "vae"),
        )
        return PairModel(
            backbone=self.folder.backbone,
            transformer=base.transformer,
            vae=base.vae,
            members=pair_run.make_members(config.pair, self.folder.backbone.adapted),
            text=jnp.zeros((2, self.folder.text_tokens, flux.joint_attention_dim), config.compute_dtype),
            pooled=jnp.zeros((2, flux.pooled_projection_dim), config.compute_dtype),
            dtype=config.compute_dtype,
        )

    def unstack(self, model) -> None:
        if self.config.unstacked:
            model.transformer.unstack()

    def frozen(self, shapes) -> dict[str, jax.Array]:
        """The captions' embeddings first: their encoders are dropped before the transformer is read."""
        texts = [*self.captions.values(), *(text for both in self.prompts for text in both)]
        self.embedded = self.embedded or self._embed(texts)
        text, pooled = (np.stack(said) for said in zip(*map(self.embedded.get, self.captions.values())))
        weights = {path: shape for path, shape in shapes.items() if path not in ("text", "pooled")}
        return {**self.folder.read(weights), "text": text, "pooled": pooled}

    def _embed(self, texts: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        texts = list(dict.fromkeys(texts))
        self.folder.tell_left_out(texts, "caption")
        config = self.config
        encoder = SharedEncoder(
            self.folder,
            config.compute_dtype,
            config.train.param_dtype,
            TEXT_ENCODERS,
            1,
            lambda model, *ids: model.prompt(*ids),
        )
        ids = zip(*self.folder.token_ids(texts))
        return {
            text: tuple(said[0] for said in encoder(*(row[None] for row in each))) for text, each in zip(texts, ids)
        }

    def initial(self, shapes) -> dict[str, np.ndarray]:
        """A's that are shared are rows of one orthonormal matrix for each width, from config.seed; free ones are
        Gaussian; B's are zero."""
        seed, members = self.config.seed, self.members
        ranks = {name: getattr(self.config.pair, f"{name}_rank") for name in members.names}
        rows = {
            width: dict(zip(ranks, pair.fresh_rows(np.random.default_rng(seed), width, tuple(ranks.values()))))
            for width in members.shared_widths
        }
        rng, arrays = np.random.default_rng((seed, 1)), {}
        for key, variable in members.parameters().items():
            (name, _, part), (blocks, width, _) = key, variable.shape
            if part == "a":
                arrays[key] = np.repeat(rows[width][name].T[None], blocks, axis=0)
            elif part == "free_a":
                arrays[key] = np.stack([pair.free_rows(rng, width, ranks[name]).T for _ in range(blocks)])
        return {name: arrays[key] for name in shapes if (key := pair_run.parse(name)) in arrays}

    def data(self, config) -> PairBatches:
        return PairBatches(self.augmentation, config)

    def encode(self, model, batch):
        """Mean and standard deviation of the latents of both images [b, 2, h, w, c], and the mode of the condition's
        [b, h, w, c]."""
        # One image of all examples after the other: half the memory.
        posterior = functools.partial(model.backbone.latents.posterior, model.vae)
        mean, deviation = zip(*in_turn(posterior, list(jnp.moveaxis(batch["images"], 1, 0))))
        encoded = {"mean": jnp.stack(mean[:2], 1), "deviation": jnp.stack(deviation[:2], 1)}
        return encoded | ({"condition": mean[2]} if len(mean) > 2 else {})

    def phases(self) -> list[Phase]:
        """The passes of the members that are on some block."""
        start = {"content": 0, "style": self.config.pair.style_start}
        return [
            Phase(name, functools.partial(self._loss, name), trained_part(name), start[name])
            for name in self.members.names
        ]

    def _loss(self, member: str, model: PairModel, batch, key):
        """Of one pass. Both passes draw alike: one noise and time, and each image its own sample of the posterior."""
        draws = draw(key, batch["mean"].shape, self.config.pair.times)
        pack, number = model.backbone.latents.pack, pair.MEMBERS.index(member)
        x0 = pack(batch["mean"][:, number] + batch["deviation"][:, number] * draws.posterior[number])
        noise, size = (
            pack(draws.noise),
            tuple(side * self.folder.vae_config.downscale for side in draws.noise.shape[1:3]),
        )
        references = pack(batch["condition"]) if "condition" in batch else None
        velocity = model.pass_velocity(member, x0, noise, draws.time, self.config.guidance, size, references)
        return weighted_mse(velocity, noise - x0, jnp.ones_like(draws.time))[0], {}

    def log_images(self, model, step: int) -> dict[str, np.ndarray]:
        """Both images beside what their passes draw from their captions, and what the base and the style alone draw
        from other prompts, all from one noise."""
        passes = [(PASSES[name], text) for name, text in self.captions.items()]
        for prompt, styled in self.prompts:
            passes += [({}, prompt), ({"style": 1.0}, styled)]
        drawn = self._drawn(model, passes)
        shown = zip(self.captions.values(), to_uint8(self.augmentation.plain()[:2]), drawn)
        others = [(styled, drawn[2 + 2 * number : 4 + 2 * number]) for number, (_, styled) in enumerate(self.prompts)]
        return {
            "pair": sheet([(text, images) for text, *images in shown], ("image", "drawn")),
            "prompts": sheet(others, ("base", "style")),
        }

    def _drawn(self, model: PairModel, passes: list[tuple[dict[str, float], str]]) -> np.ndarray:
        """uint8 [n, h, w, 3]: an image for each (weights of the members, text), config.evaluation.batch at a time."""
        evaluation, (height, width) = self.config.evaluation, self.shape
        patch = model.backbone.latents.patch * model.vae.config.downscale
        noise = jax.random.normal(random_key(0), (1, height * width // patch**2, self.folder.flux_config.in_channels))
        sigmas = self.folder.schedule.sigmas(evaluation.steps, noise.shape[1])
        condition = self.augmentation.plain()[2:] if self.config.data.condition else None
        # Whole chunks, so that one program serves them all.
        padded = passes + passes[-1:] * (-len(passes) % evaluation.batch)
        images = []
        for start in range(0, len(padded), evaluation.batch):
            chunk = padded[start : start + evaluation.batch]
            text, pooled = (np.stack(said) for said in zip(*(self.embedded[text] for _, text in chunk)))
            weights = jnp.concatenate([model.basis.row(each) for each, _ in chunk])
            given = (weights, noise, condition, text, pooled, jnp.float32(evaluation.guidance), sigmas)
            images.append(to_uint8(_sample(model, self.shape, *given)))
        return np.concatenate(images)[: len(passes)]

    def finish(self, model, workdir: Path) -> None:
        """Writes each adapter in the published format, float32."""
        for name in model.basis.names:
            path = workdir / pair_run.EXPORTED[name]
            write_member(path, model.basis.member(name))
            print(f"the {name} adapter is in {path}", flush=True)


@functools.partial(nnx.jit, static_argnums=1)
def _sample(model: PairModel, size: Size, weights_bn, noise, condition, text, pooled, guidance, sigmas) -> jax.Array:
    """Images [b, h, w, 3] in −1..1, each with its own weights of the members."""
    b, codec = weights_bn.shape[0], model.backbone.latents
    references = None if condition is None else codec.pack(codec.encode(model.vae, condition))
    noise, references = (None if one is None else jnp.repeat(one, b, axis=0) for one in (noise, references))
    adapters = model.basis.adapters(weights_bn)
    return model.images(model.sample(noise, references, text, pooled, guidance, sigmas, size, adapters), *size)
