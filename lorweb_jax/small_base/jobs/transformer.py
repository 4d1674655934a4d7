"""Trains the small base's transformer and text encoders to draw from text and to edit by instruction.

small_base/corpus.py says what a batch shows, small_base/editor.py has the model and its loss.
"""

import hashlib
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.fingerprint import of_folders
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.data.embedded.bulk import operated_chunk
from lorweb_jax.data.embedded.drawing_sets import DrawingSets, load_sets
from lorweb_jax.data.embedded.operations import OPERATIONS
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.files.state import build, differences, flat_state
from lorweb_jax.images.levels import to_float, to_uint8
from lorweb_jax.images.pictures import sheet
from lorweb_jax.models.autoencoder.model import AutoencoderKL, VAEConfig
from lorweb_jax.models.clip.folder import open_clip_text, save_clip
from lorweb_jax.models.t5 import model as t5
from lorweb_jax.nn.layers import Weight
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.pretrained import load_transformer, load_vae, save_folder, save_transformer
from lorweb_jax.small_base.autoencoder import enlarged
from lorweb_jax.small_base.captions import Captions
from lorweb_jax.small_base.corpus import VARIANTS, Corpus, draw_batch, look_up, make_corpus, some, spread
from lorweb_jax.small_base.editor import Editor, EditorConfig, editor_config, flow_loss, sample
from lorweb_jax.small_base.tokens import make_tokenizers, tokens_of
from lorweb_jax.training.job import Job, NumberedBatches


def make(config) -> "BaseTransformer":
    return BaseTransformer(config)


class LatentBatches(NumberedBatches):
    """Endless batches of latents by form: see corpus.look_up; numbered entries "canvas.latents" and so on, each
    [groups, examples of the form in a group, …].

    A batch depends on the seed and its number only, which is the position that is saved.
    """

    def __init__(self, tables: tuple[np.ndarray, np.ndarray], corpus: Corpus, groups: int, config, seed: int):
        self.tables, self.groups, self.seed, self.position = tables, groups, seed, 0
        self.draw = jax.jit(lambda key: draw_batch(key, corpus, groups, config.forms, config.data))

    def at(self, number: int) -> dict[str, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        forms = look_up(jax.device_get(self.draw(key)), *self.tables)
        return {
            f"{form}.{name}": array.reshape(self.groups, -1, *array.shape[1:])
            for form, arrays in forms.items()
            for name, array in arrays.items()
        }


def by_form(batch: dict) -> dict[str, dict]:
    """{form: {name: [n, …]}} of what `LatentBatches` gives."""
    forms: dict[str, dict] = {}
    for key, array in batch.items():
        form, name = key.split(".")
        forms.setdefault(form, {})[name] = array.reshape(-1, *array.shape[2:])
    return forms


class BaseTransformer(Job):
    """See training/job.py for what each method is for."""

    trainable = Weight

    def __init__(self, config):
        self.config = config
        drawings = load_sets(config.data.drawings)
        self.drawings = some(drawings, config.data.signs) if config.data.signs else drawings
        vae_folder = Path(config.data.vae)
        if not (vae_folder / "config.json").is_file():
            raise UserError(
                f"there is no autoencoder in {vae_folder}; train it first with "
                "`python -m lorweb_jax.main --config=configs/base_vae.py`"
            )
        vae_config, weights = load_vae(vae_folder)
        self.vae = build(lambda: AutoencoderKL(VAEConfig.from_json(vae_config), rngs=nnx.Rngs(0)), weights)
        self.encoded = spread(self.drawings, config.data.encoded)
        self.tables = latents_of(self.vae, weights, self.drawings, config.data, self.encoded)
        self.captions = Captions([self.drawings.captions(i) for i in range(len(self.drawings))])
        with tempfile.TemporaryDirectory() as folder:
            vocabularies = self._tokenizers(Path(folder))
            self.clip_ids, self.t5_ids = tokens_of(self.captions.texts, Path(folder), config.data.text_tokens)
        self.editor_config: EditorConfig = editor_config(config, *vocabularies)

    def _tokenizers(self, folder: Path) -> tuple[int, int]:
        return make_tokenizers(self.captions.texts, folder, self.config.data.text_tokens)

    @property
    def attention_heads(self) -> list[int]:
        return [self.config.transformer.num_attention_heads]

    def build(self, rngs: nnx.Rngs) -> Editor:
        return Editor(self.editor_config, self.config.unroll, rngs=rngs)

    def initial(self, shapes) -> dict[str, np.ndarray]:
        """The weights in the parts of config.initial's folder, of all `shapes`; none where no folder is given."""
        if not self.config.initial:
            return {}
        return {
            name: np.asarray(array, np.float32)
            for name, array in read_editor(Path(self.config.initial), self.editor_config, shapes).items()
        }

    def sources(self) -> dict[str, str]:
        if not self.config.initial:
            return {}
        parts = ("transformer", "text_encoder", "text_encoder_2")
        return {"initial": of_folders(Path(self.config.initial) / part for part in parts)}

    def batches(self, groups: int, seed: int, held_out: bool = False) -> LatentBatches:
        corpus = make_corpus(self.drawings, self.captions, self.config.data.variants, held_out, self.encoded)
        return LatentBatches(self.tables, corpus, groups, self.config, seed)

    def data(self, config) -> LatentBatches:
        return self.batches(config.train.batch, config.seed)

    def loss(self, model, batch, key):
        return flow_loss(model, by_form(batch), self.clip_ids, self.t5_ids, key, self.config)

    def log_images(self, model, step: int) -> dict[str, np.ndarray]:
        """Held-out drawings edited by instruction (canvas, result, truth), and drawings from captions of training
        drawings (result, drawing)."""
        batch = by_form(next(self.batches(8, seed=1, held_out=True)))
        seen = by_form(next(self.batches(8, seed=1)))
        shown = {}
        for name, form, columns in (
            ("edits", batch["canvas"], ("canvas", "edited", "truth")),
            ("single_edits", batch["single"], ("drawing", "edited", "truth")),
            ("drawings", seen["drawing"], ("drawn", "drawing")),
            ("large", seen["large"], ("drawn", "drawing")),
        ):
            pictures = [self._sample(model, form), form["latents"]]
            if "condition" in form:
                pictures.insert(0, form["condition"])
            images = [to_uint8(self._decode(x)) for x in pictures]
            texts = [self.captions.texts[row] for row in form["caption"]]
            shown[name] = sheet(list(zip(texts, zip(*images)))[:24], columns)
        return shown

    def _sample(self, model: Editor, form: dict[str, np.ndarray]) -> np.ndarray:
        condition = form.get("condition")
        noise = jax.random.normal(jax.random.key(0), form["latents"].shape)
        return to_host(
            _sample(
                model,
                noise,
                None if condition is None else jnp.asarray(condition, jnp.float32),
                self.clip_ids[form["caption"]],
                self.t5_ids[form["caption"]],
                self.config.evaluation.steps,
            )
        )

    def _decode(self, latents: np.ndarray) -> jax.Array:
        return _decode(self.vae, jnp.asarray(latents, jnp.float32))

    def finish(self, model, workdir: Path) -> None:
        """Writes the trained parts of the pipeline folder, float16, and the error of held-out edits."""
        write_editor(workdir, self.editor_config, model)
        self._tokenizers(workdir)
        form = by_form(next(self.batches(64, seed=2, held_out=True)))["canvas"]
        shown = [to_host(self._decode(x)) for x in (self._sample(model, form), form["latents"], form["condition"])]
        write_json(
            workdir / "quality.json",
            {
                "mse_of_edits": float(np.square(shown[0] - shown[1]).mean()),
                "mse_of_doing_nothing": float(np.square(shown[2] - shown[1]).mean()),
            },
        )


def write_editor(workdir: Path, config: EditorConfig, model: Editor) -> None:
    """transformer, text_encoder and text_encoder_2 of a pipeline folder, float16."""
    save_transformer(workdir / "transformer", config.flux.to_json(), flat_state(model.transformer), np.float16)
    save_clip(model.text_encoder, workdir / "text_encoder", np.float16)
    save_folder(
        workdir / "text_encoder_2",
        config.text_2.to_json(),
        flat_state(model.text_encoder_2),
        t5.TABLE,
        np.float16,
        stem="model",
    )


def read_editor(folder: Path, config: EditorConfig, shapes) -> dict[str, np.ndarray]:
    """What `write_editor` wrote, as float32 weights of the paths and shapes in `shapes`; UserError for other sizes."""
    _, flux = load_transformer(folder / "transformer")
    parts = {
        "transformer": flux,
        "text_encoder": open_clip_text(folder / "text_encoder")[1].load(),
        "text_encoder_2": t5.open_t5(folder / "text_encoder_2")[1].load(),
    }
    weights = {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
    if lines := differences(
        {name: array.shape for name, array in weights.items()}, {name: shape.shape for name, shape in shapes.items()}
    ):
        raise UserError(
            f"the weights in {folder} don't fit the config ({lines[0]}); set config.transformer, text and "
            "text_2 as their config.json say, or choose another config.initial"
        )
    return weights


@nnx.jit(static_argnums=5)
def _sample(model: Editor, noise, condition, clip_ids, t5_ids, steps):
    return sample(model, noise, condition, clip_ids, t5_ids, steps)


@nnx.jit
def _decode(vae: AutoencoderKL, latents: jax.Array) -> jax.Array:
    return vae.image(latents)


def latents_of(
    vae: AutoencoderKL, weights, drawings: DrawingSets, data, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float16 latents of all drawings: [variants · drawings, 1 + operations, h, w, c], plain and after each operation,
    and of the plain drawings at the canvas's size [drawings, 2h, 2w, c]. Rows of drawings that aren't `wanted`
    (bool [drawings]) may be zeros. Computed once for a given autoencoder (an hour on two cores for a variant of 10,000
    drawings) and kept in the cache folder, row by row, so that a run that is stopped goes on, and one that wants more
    drawings computes those alone."""
    key = hashlib.sha256(b"".join(np.ascontiguousarray(weights[name]).tobytes() for name in sorted(weights)))
    key.update(np.ascontiguousarray(drawings.images).tobytes() + repr((data.variants, list(OPERATIONS))).encode())
    names, total, side = ["", *OPERATIONS], len(drawings), data.size // 8
    shapes = {
        "quadrants": ((data.variants * total, len(names), side, side, 16), np.float16),
        "large": ((total, 2 * side, 2 * side, 16), np.float16),
        "done": ((data.variants * total,), np.bool),
    }
    folder = Path(data.cache) / f"latents_{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    # Files with holes: rows that nobody wants take no space.
    quadrants, large, done = (
        np.lib.format.open_memmap(path, "r+" if path.is_file() else "w+", dtype, shape)
        for path, (shape, dtype) in ((folder / f"{name}.npy", of) for name, of in shapes.items())
    )
    encode = nnx.jit(lambda vae, x: vae.latents(to_float(x)).astype(jnp.float16))
    encode_large = nnx.jit(lambda vae, x: vae.latents(to_float(enlarged(x))).astype(jnp.float16))
    wanted = np.flatnonzero(np.tile(wanted, data.variants))
    missing = wanted[~done[wanted]]
    with progress_bar("latents", len(wanted), len(wanted) - len(missing), seconds=10.0, unit=" drawings") as bar:
        for start in range(0, len(missing), _ROWS):
            chosen = missing[start : start + _ROWS]
            images = np.stack([VARIANTS[i // total](drawings.images[i % total]) for i in chosen])
            images_after = operated_chunk(images, names)
            padded = np.resize(images_after, (_ROWS, *images_after.shape[1:]))  # one compilation
            latents = np.asarray(encode(vae, padded.reshape(-1, *images_after.shape[2:])))
            quadrants[chosen] = latents.reshape(_ROWS, len(names), *latents.shape[1:])[: len(chosen)]
            if (plain := chosen < total).any():
                large[chosen[plain]] = np.asarray(encode_large(vae, padded[:, 0]))[: len(chosen)][plain]
            for table in (quadrants, large):
                table.flush()
            done[chosen] = True
            bar.update(len(chosen))
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("quadrants", "large"))


_ROWS = 4  # drawings that are encoded at once: larger batches leave the processor's cache
