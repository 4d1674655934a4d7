"""Trains the small base's transformer and text encoders to edit canvases of drawings by instruction.

A canvas holds four drawings. The instruction is carried out on all of them, or, when it says so, on the last one
alone. No canvas shows a drawing before and after an edit: what a pair of images means is for the basis to learn.
"""

import hashlib
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.data.drawings import load_drawings
from lorweb_jax.data.operations import LAST_ONLY, OPERATIONS, all_sentences, on_white
from lorweb_jax.encoders import t5
from lorweb_jax.encoders.clip import ClipText, CLIPTextConfig, save_clip
from lorweb_jax.encoders.small_tokenizers import CLIP_TOKENS, train_small_tokenizers
from lorweb_jax.encoders.tokenizers import tokenize_clip, tokenize_t5
from lorweb_jax.errors import UserError
from lorweb_jax.flow.loss import draw, weighted_mse
from lorweb_jax.flow.sampling import euler
from lorweb_jax.flow.schedule import Schedule, train_timesteps, train_weights
from lorweb_jax.images.levels import to_float, to_uint8
from lorweb_jax.latents.packing import pack, position_ids, text_ids, unpack
from lorweb_jax.latents.vae import AutoencoderKL, VAEConfig
from lorweb_jax.layers import Weight
from lorweb_jax.sharding import to_host
from lorweb_jax.training.pictures import sheet
from lorweb_jax.transformer.flux import Flux, FluxConfig
from lorweb_jax.weights.pretrained import load_vae, save_folder, save_transformer
from lorweb_jax.weights.safetensors_io import write_json
from lorweb_jax.weights.state import build, flat_state


def make(config) -> "BaseTransformer":
    return BaseTransformer(config)


class Editor(nnx.Module):
    """The transformer with both of its text encoders."""

    def __init__(self, flux: FluxConfig, text: CLIPTextConfig, text_2: t5.T5Config, unroll: int, *, rngs: nnx.Rngs):
        self.transformer = Flux(flux, unroll=unroll, rngs=rngs)
        self.text_encoder = ClipText(text, rngs=rngs)
        self.text_encoder_2 = t5.T5Encoder(text_2, rngs=rngs)

    def velocity(self, tokens, condition, clip_ids, t5_ids, time, guidance, side: int):
        """Velocity [b, s, c] of the noisy tokens [b, s, c] of latents side x side."""
        ids = jnp.concatenate([position_ids(side, side, 0), position_ids(side, side, 1)])
        text = self.text_encoder_2(t5_ids)
        v = self.transformer(jnp.concatenate([tokens, condition], axis=1), text, self.text_encoder(clip_ids), time,
                             guidance, ids, text_ids(text.shape[1]))
        return v[:, :tokens.shape[1]]


class Edits:
    """Endless batches of canvases by number: which drawing, which operation before and after, and which caption.

    "latents" and "condition" are float16 [b, side, side, c], "caption" int32 [b] a row of the caption table.
    A batch depends on the seed and its number only, which is the position that is saved.
    """

    def __init__(self, table: np.ndarray, drawings: np.ndarray, captions: "Captions", batch: int, data, seed: int):
        self.table, self.drawings, self.captions = table, drawings, captions
        self.batch, self.shares, self.seed, self.position = batch, data, seed, 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        b, shares, operations = self.batch, self.shares, self.table.shape[1] - 1
        drawing = rng.choice(self.drawings, (b, 4))
        variant = rng.integers(self.table.shape[0], size=(b, 4))
        wanted = rng.integers(1, 1 + operations, size=b)                # 0 is the plain drawing
        last_only = rng.random(b) < shares.last_only
        before = np.zeros((b, 4), np.int64)
        # A canvas of which only the last drawing changes may show the others edited in any way, and the last twice.
        others = rng.random((b, 3)) < shares.edited_before
        before[:, :3] = np.where(last_only[:, None] & others, rng.integers(1, 1 + operations, size=(b, 3)), 0)
        twice = last_only & (rng.random(b) < shares.twice)
        for array, shown in ((drawing, drawing[:, 3]), (variant, variant[:, 3]), (before, before[:, 3])):
            array[:, 2] = np.where(twice, shown, array[:, 2])
        after = np.where(last_only[:, None], before, wanted[:, None])
        after[:, 3] = wanted
        silent = rng.random(b) < shares.silent                           # an empty instruction changes nothing
        after = np.where(silent[:, None], before, after)
        caption = np.where(silent, 0, self.captions.draw(rng, wanted, last_only, shares.vague))
        return {"latents": self.canvas(variant, after, drawing), "condition": self.canvas(variant, before, drawing),
                "caption": caption.astype(np.int32)}

    def canvas(self, variant: np.ndarray, operation: np.ndarray, drawing: np.ndarray) -> np.ndarray:
        """The latents [b, 2h, 2w, c] of canvases of four drawings, index arrays [b, 4]."""
        quadrants = self.table[variant, operation, drawing]
        b, _, h, w, c = quadrants.shape
        return quadrants.reshape(b, 2, 2, h, w, c).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c)

    def get_state(self) -> dict[str, int]:
        return {"batches": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["batches"]


class Captions:
    """Every instruction: row 0 is empty; then by operation (1 …) three sentences for all drawings, three for the last."""

    def __init__(self):
        self.texts = [""]
        for operation in OPERATIONS.values():
            sentences = (operation.instruction, *operation.specific)
            self.texts += [*sentences, *(LAST_ONLY.format(sentence) for sentence in sentences)]

    def draw(self, rng: np.random.Generator, operation: np.ndarray, last_only: np.ndarray, vague: float) -> np.ndarray:
        wording = np.where(rng.random(len(operation)) < vague, 0, rng.integers(1, 3, size=len(operation)))
        return self.row(operation, last_only, wording)

    def row(self, operation, last_only, wording):
        """The row of an operation's sentence: wording 0 is the vague one, 1 and 2 the specific ones."""
        return 1 + 6 * (operation - 1) + 3 * last_only + wording


class BaseTransformer:
    """See training/job.py for what each method is for."""

    trainable = Weight

    def __init__(self, config):
        self.config = config
        drawings = load_drawings(config.data.cache, config.data.size)
        vae_folder = Path(config.data.vae)
        if not (vae_folder / "config.json").is_file():
            raise UserError(f"there is no autoencoder in {vae_folder}; train it first with "
                            "`python -m lorweb_jax.main --config=configs/base_vae.py`")
        vae_config, weights = load_vae(vae_folder)
        self.vae = build(lambda: AutoencoderKL(VAEConfig.from_json(vae_config), rngs=nnx.Rngs(0)), weights)
        self.table = quadrant_latents(self.vae, weights, drawings.images, config.data)
        self.seen, self.unseen = np.flatnonzero(~drawings.held_out), np.flatnonzero(drawings.held_out)
        self.names = drawings.part(held_out=False).names
        self.captions = Captions()
        with tempfile.TemporaryDirectory() as folder:
            clip_words, t5_words = self._tokenizers(Path(folder))
            self.clip_ids = tokenize_clip(self.captions.texts, Path(folder) / "tokenizer", config.data.text_tokens)
            self.t5_ids = tokenize_t5(self.captions.texts, Path(folder) / "tokenizer_2", config.data.text_tokens)
        self.text_config = CLIPTextConfig(
            **config.text, hidden_act="quick_gelu", vocab_size=clip_words, max_position_embeddings=CLIP_TOKENS,
            projection_dim=config.text.hidden_size, bos_token_id=clip_words - 2, eos_token_id=clip_words - 1,
            pad_token_id=clip_words - 1)
        self.t5_config = t5.T5Config(vocab_size=t5_words, **config.text_2)
        self.flux_config = FluxConfig(
            **(config.transformer.to_dict() | {"axes_dims_rope": tuple(config.transformer.axes_dims_rope)}),
            joint_attention_dim=self.t5_config.d_model, pooled_projection_dim=self.text_config.hidden_size)
        self.side = 2 * self.table.shape[3]

    def _tokenizers(self, folder: Path) -> tuple[int, int]:
        return train_small_tokenizers(self.names, all_sentences(), folder, t5_tokens=self.config.data.text_tokens)

    def build(self, rngs: nnx.Rngs) -> Editor:
        return Editor(self.flux_config, self.text_config, self.t5_config, self.config.unroll, rngs=rngs)

    def data(self, config) -> Edits:
        return Edits(self.table, self.seen, self.captions, config.train.batch, config.data, config.seed)

    def loss(self, model, batch, key):
        low, high = self.config.guidance
        noise_key, guidance_key = jax.random.split(key)
        x0, condition = (pack(batch[name].astype(jnp.float32)) for name in ("latents", "condition"))
        noised = draw(noise_key, x0, train_timesteps(), train_weights(self.config.loss_weight))
        # Any guidance value means the same to this base: it is trained from data, not distilled.
        guidance = jax.random.uniform(guidance_key, (x0.shape[0],), minval=low, maxval=high)
        velocity = model.velocity(
            noised.tokens_bsc, condition, jnp.asarray(self.clip_ids)[batch["caption"]],
            jnp.asarray(self.t5_ids)[batch["caption"]], noised.time_b, guidance, self.side)
        return weighted_mse(velocity, noised.target_bsc, noised.weight_b)[0], {}

    def show(self, model, step: int) -> dict[str, np.ndarray]:
        """Held-out drawings edited as told: the canvas, the result, the truth."""
        edits = Edits(self.table, self.unseen, self.captions, 24, self.config.data, seed=1)
        batch = next(edits)
        result = self._sample(model, batch)
        images = [to_uint8(self._decode(x)) for x in (batch["condition"], result, batch["latents"])]
        texts = [self.captions.texts[row] for row in batch["caption"]]
        return {"held_out": sheet(list(zip(texts, zip(*images))), ("canvas", "edited", "truth"))}

    def _sample(self, model: Editor, batch: dict[str, np.ndarray]) -> np.ndarray:
        condition = pack(jnp.asarray(batch["condition"], jnp.float32))
        noise = jax.random.normal(jax.random.key(0), condition.shape)
        sigmas = jnp.asarray(Schedule().sigmas(self.config.show_steps, condition.shape[1]))
        result = _euler(model, noise, condition, jnp.asarray(self.clip_ids)[batch["caption"]],
                        jnp.asarray(self.t5_ids)[batch["caption"]], sigmas, self.side)
        return to_host(unpack(result, self.side, self.side))

    def _decode(self, latents: np.ndarray) -> jax.Array:
        return _decode(self.vae, jnp.asarray(latents, jnp.float32))

    def finish(self, model, workdir: Path) -> None:
        """Writes the parts of the pipeline folder that come from here, float16, and how far held-out edits are off."""
        save_transformer(workdir / "transformer", self.flux_config.to_json(), flat_state(model.transformer), np.float16)
        save_clip(model.text_encoder, workdir / "text_encoder", np.float16)
        save_folder(workdir / "text_encoder_2", self.t5_config.to_json(), flat_state(model.text_encoder_2),
                    t5.TABLE, np.float16, stem="model")
        self._tokenizers(workdir)
        batch = next(Edits(self.table, self.unseen, self.captions, 256, self.config.data, seed=2))
        shown = [to_host(self._decode(x)) for x in (self._sample(model, batch), batch["latents"], batch["condition"])]
        write_json(workdir / "quality.json", {
            "mse_of_edits": float(np.square(shown[0] - shown[1]).mean()),
            "mse_of_doing_nothing": float(np.square(shown[2] - shown[1]).mean())})


@nnx.jit(static_argnums=6)
def _euler(model: Editor, noise, condition, clip_ids, t5_ids, sigmas, side):
    guidance = jnp.full((noise.shape[0],), 2.5)
    return euler(lambda z, time: model.velocity(z, condition, clip_ids, t5_ids, time, guidance, side), noise, sigmas)


@nnx.jit
def _decode(vae: AutoencoderKL, latents: jax.Array) -> jax.Array:
    return vae.image(latents)


# Drawings are also shown in other colours and mirrored, which the words for colours and sides don't mind: the
# instruction names the result's colour, never the drawing's.
VARIANTS = (lambda rgba: rgba,
            lambda rgba: rgba[:, :, ::-1][..., [1, 2, 0, 3]],
            lambda rgba: rgba[..., [2, 0, 1, 3]])


def quadrant_latents(vae: AutoencoderKL, weights, images: np.ndarray, data) -> np.ndarray:
    """float16 [variants, 1 + operations, drawings, h, w, c]: the latents of each drawing, plain and after each
    operation; computed once for a given autoencoder and kept in the cache folder."""
    key = hashlib.sha256(b"".join(np.ascontiguousarray(weights[name]).tobytes() for name in sorted(weights)))
    key.update(repr((data.size, data.variants, list(OPERATIONS))).encode())
    path = Path(data.cache) / f"latents_{key.hexdigest()[:16]}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    encode = nnx.jit(lambda vae, x: vae.latents(to_float(x)).astype(jnp.float16))
    rows = []
    for v, variant in enumerate(VARIANTS[:data.variants]):
        drawings = variant(images)
        for apply in (on_white, *(operation.apply for operation in OPERATIONS.values())):
            rows.append(np.asarray(encode(vae, jnp.asarray(np.stack([apply(drawing) for drawing in drawings])))))
        print(f"latents of the drawings: {v + 1} of {data.variants} variants", flush=True)
    table = np.stack(rows).reshape(data.variants, -1, *rows[0].shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial.npy")
    np.save(partial, table)
    partial.replace(path)
    return table
