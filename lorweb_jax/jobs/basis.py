"""Trains a basis of LoRAs and its router on analogies over a frozen FLUX Kontext pipeline (method.md §5).

Before each step the devices encode images to latents, and captions and images to text embeddings and queries; or these
are read from disk (config.precomputed), and the model has no encoders.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters.basis import BasisConfig, BasisParam
from lorweb_jax.adapters.coefficients import RouterParameters
from lorweb_jax.adapters.formats.basis_file import unpublishable
from lorweb_jax.adapters.sharing import drop_members, imbalance
from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies, contents
from lorweb_jax.data.buckets import quadrant_shapes
from lorweb_jax.data.loader import AnalogyLoader
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.splits import read_splits
from lorweb_jax.evaluation import lpips, probes
from lorweb_jax.evaluation.evaluate import rows_sheet
from lorweb_jax.evaluation.methods import edit_samples, evaluate_pipeline
from lorweb_jax.evaluation.routing import routing_of
from lorweb_jax.evaluation.samples import Sample, read_samples
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.flow.loss import draw, weighted_mse
from lorweb_jax.flow.schedule import train_timesteps, train_weights
from lorweb_jax.images.plots import heat_map, plane
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.identity import identity
from lorweb_jax.nn import quantization, sharding
from lorweb_jax.nn.attention import choose
from lorweb_jax.nn.layers import in_turn
from lorweb_jax.pipeline.adapters import ENCODER, write_run
from lorweb_jax.pipeline.folder import MODEL_PARTS, PARTS, PipelineFolder
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.pipeline.saving import arrays_of
from lorweb_jax.precomputed.read import Precomputed
from lorweb_jax.precomputed.scope import Scope
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.training.job import Job
from lorweb_jax.training.report import report_only
from lorweb_jax.training.step import numeric

LAYERS_SHOWN = 100  # rows of the picture of all layers, about


def make(config) -> "BasisJob":
    return BasisJob(config)


class BasisJob(Job):
    """See training/job.py for what each method is for."""

    trainable = BasisParam

    def __init__(self, config):
        self.config = config
        quantization.check(config.quantization)
        self.basis_config = BasisConfig(**config.basis)
        self.folder = PipelineFolder(config.pipeline, config.basis.encoder or None)
        self.problems = Problems()  # files of the data that can't be used, found now or while reading
        self._looked_at = Problems()  # the same while pictures and tables are made
        self.tasks = read_splits(config, self.problems)
        if count := config.evaluation.validate:
            if len(self.tasks) < 2:
                raise UserError(
                    f"config.evaluation.validate is {count}, but no task is held out; set config.data.held_out, or 0", 2
                )
            if (processes := jax.process_count()) > 1:
                raise UserError(
                    f"config.evaluation.validate is {count}, for one process, and {processes} train; set it to 0", 2
                )
        if len(self.problems):
            print(self.problems.summary(), flush=True)
        self.scope = Scope.of(config, self.folder, self.tasks) if config.precomputed else None
        if missing := lpips.missing():
            print(
                f"note: {missing}; without it the run ends without its tables, which python -m lorweb_jax.evaluate "
                "makes later",
                flush=True,
            )

    def rate(self, path: str) -> float:
        """routing.rate for the router's parameters."""
        return self.config.routing.rate if path.rpartition(".")[2] in RouterParameters._fields else 1.0

    def sources(self) -> dict[str, str]:
        train, *held_out = (contents(tasks) for tasks in self.tasks.values())
        encoder = self.folder.encoder_folder
        return {
            "pipeline": fingerprint.of_folders(self.folder.folder / part for part in PARTS),
            "basis.encoder": fingerprint.of_folder(encoder) if encoder else "none",
            "data.root": train,
            "data.held_out": " ".join(held_out),
        }

    @functools.cached_property
    def signed_config(self) -> BasisConfig:
        """basis_config with the image encoder's public name and a sketch of its weights, by which it is recognised."""
        if not self.basis_config.coefficients.from_images or not self.folder.encoder_folder:
            return self.basis_config
        encoder = identity(self.folder.encoder_folder)
        return dataclasses.replace(self.basis_config, encoder=encoder.name, encoder_sketch=encoder.sketch)

    @functools.cached_property
    def precomputed(self) -> Precomputed | None:
        """Precomputed embeddings in place of the encoders; None where the step computes them."""
        return Precomputed(self.scope) if self.scope else None

    @functools.cached_property
    def attention(self) -> str:
        """The implementation that config.attention selects; "auto" by the shape of one device's share of a step."""
        config, flux = self.config, self.folder.flux_config
        height, width = max(quadrant_shapes(config.data), key=math.prod, default=(256, 256))
        tokens = 8 * height * width // (2 * self.folder.vae_config.downscale) ** 2 + self.folder.text_tokens
        shape = (1, tokens, flux.num_attention_heads, flux.attention_head_dim)
        return choose(config.attention, shape, jnp.dtype(config.compute_dtype), backward=True)

    @property
    def attention_heads(self) -> list[int]:
        return [self.folder.backbone.heads]

    @property
    def sequences(self) -> list[int]:
        patch = self.folder.backbone.latents.patch * self.folder.vae_config.downscale
        shown = [2 * 4 * height * width // patch**2 for height, width in quadrant_shapes(self.config.data)]
        return [length + text for length in shown for text in (0, self.folder.text_tokens)]

    @property
    def offloaded(self) -> Sequence[str]:
        return self.folder.stacks if self.config.offload == "blocks" else ()

    @property
    def sampling(self) -> dict:
        """How images and tables are sampled."""
        return {name: self.config.evaluation[name] for name in ("steps", "guidance", "batch")}

    def build(self, rngs: nnx.Rngs) -> AnalogyModel:
        left_out = self.scope.left_out if self.scope else ()
        return self.folder.make(
            rngs,
            self.signed_config,
            dtype=self.config.compute_dtype,
            remat=self.config.remat,
            attention=self.attention,
            unroll=self.config.unroll,
            quantization=self.config.quantization,
            parts=[part for part in MODEL_PARTS if part not in left_out],
        )

    def unstack(self, model) -> None:
        if self.config.unstacked:
            model.transformer.unstack()

    def frozen(self, shapes) -> dict[str, jax.Array]:
        return self.folder.read(shapes)

    def data(self, config) -> AnalogyLoader:
        """Those rows of each global batch that this process's devices hold."""
        if self.precomputed:
            print(f"text{'' if self.scope.queries_kept else ' and queries'} from {self.scope.root}", flush=True)
        else:
            self.folder.tell_left_out(
                (pair.instruction for task in self.tasks["train"] for pair in task.pairs), "caption"
            )
        drops = {name: config.data[name] for name in ("caption_drop", "reverse_probability", "workers")}
        loader = self._loader_of("train", self.problems, seed=config.seed, **drops)
        if loader.bucketed:
            print(loader.bucketed.summary(), flush=True)
        self._loader = loader
        return loader

    def _loader_of(self, split: str, problems: Problems, **options) -> AnalogyLoader:
        """Those rows of each batch of a split that this process's devices hold."""
        data, batch = self.config.data, self.config.train.batch
        return AnalogyLoader(
            Analogies(self.tasks[split]),
            batch,
            quadrant_size=None if data.buckets else data.quadrant_size,
            buckets=data.buckets,
            task_balanced=data.task_balanced,
            rows=sharding.batch_rows(sharding.make_mesh(self.config.mesh), batch),
            problems=problems,
            **options,
        )

    def _samples(self, split: str, per_task: int, tasks: int | None = None) -> list[Sample]:
        """Analogies of a split for images and tables, always the same; of `tasks` tasks spread over the split."""
        chosen = self.tasks[split]
        if tasks:
            chosen = chosen[:: max(1, len(chosen) // tasks)][:tasks]
        sides = [2 * max(shape) for shape in quadrant_shapes(self.config.data)]
        return read_samples(chosen, per_task, self._looked_at, max(sides, default=None))

    def prepare(self, batch: dict) -> dict:
        """Token ids of the captions and the image encoder's views of the condition grids; or, of both, what was
        precomputed."""
        # An example's two grids side by side, [b, 2, H, W, 3]: a split of the batch keeps them together.
        prepared = {"grids": np.stack([batch["target"], batch["condition"]], axis=1)}
        if self.basis_config.temperature_mode == "annealed":
            prepared["temperature"] = np.full(len(batch["target"]), self._temperature(), np.float32)
        if self.precomputed:
            prepared["text"], prepared["pooled"] = self.precomputed.prompt(list(batch["caption"]))
            query = self.precomputed.batch_query(batch["images"], batch["task"])
            if query is not None:
                return prepared | {"query": query}
        else:
            prepared["clip_ids"], prepared["t5_ids"] = self.folder.token_ids(list(batch["caption"]))
        if self.basis_config.coefficients.from_images:
            prepared["views"] = queries.views(
                self.basis_config.query_mode, list(batch["condition"]), self.folder.encoder.processor
            )
        return prepared

    def _temperature(self) -> float:
        """Of the step whose batch was read last: from basis.temperature to 1, falling or rising geometrically."""
        done = self._loader.get_state()["batches"]
        return self.basis_config.temperature ** max(0.0, 1 - (done - 1) / self.config.train.steps)

    def encode(self, model, batch):
        """Latents of target and condition [b, 2, h, w, c]; of what is not precomputed, text [b, t, j] and pooled [b,
        p], and the query [b, q] of a router that asks from outside."""
        # All targets, then all conditions: half the memory of both at once, and a quarter fewer bytes moved as the TPU
        # compiler counts them.
        encoded = {"latents": jnp.stack(in_turn(model.latents, list(jnp.moveaxis(batch["grids"], 1, 0))), axis=1)}
        if "clip_ids" in batch:
            encoded["text"], encoded["pooled"] = model.prompt(batch["clip_ids"], batch["t5_ids"])
        if "views" in batch:
            encoded["query"] = model.query(batch["views"])
        return encoded

    def loss(self, model, batch, key):
        examples = batch["latents"].shape[0]
        coefficients = model.basis.coefficients(batch.get("query"), examples, batch.get("temperature"))
        routing, metrics, penalty = self.config.routing, {}, 0.0
        if routing.balance:
            metrics["imbalance"] = imbalance(coefficients)
            penalty = routing.balance * metrics["imbalance"]
        if routing.member_dropout:
            softmax = self.basis_config.activation == "softmax"
            coefficients = drop_members(coefficients, jax.random.fold_in(key, 1), routing.member_dropout, softmax)
        return self._denoising_error(model, batch, key, coefficients) + penalty, metrics

    def _denoising_error(self, model, batch, key, coefficients) -> jax.Array:
        x0, condition = (model.backbone.latents.pack(batch["latents"][:, image]) for image in (0, 1))
        noised = draw(key, x0, train_timesteps(), train_weights(self.config.loss_weight))
        height, width = (side * self.folder.vae_config.downscale for side in batch["latents"].shape[2:4])
        guidance = jnp.full(x0.shape[:1], self.config.guidance)
        velocity = model.velocity(
            noised.tokens_bsc,
            condition,
            batch["text"],
            batch["pooled"],
            noised.time_b,
            guidance,
            (height, width),
            model.basis.adapters(coefficients),
        )
        return weighted_mse(velocity, noised.target_bsc, noised.weight_b)[0]

    def validate(self, model, step: int) -> float | None:
        """The denoising error on config.evaluation.validate analogies of the first held-out split, always the same ones
        with the same noise; nothing is dropped or added."""
        if not self.config.evaluation.validate:
            return None
        errors = [self._validation_error(model, batch, random_key(i)) for i, batch in enumerate(self._validation)]
        return float(np.mean(jax.device_get(errors)))

    @functools.cached_property
    def _validation(self) -> list[dict[str, jax.Array]]:
        """The batches of `validate`."""
        config, split = self.config, list(self.tasks)[1]
        loader = self._loader_of(split, self._looked_at, seed=0, caption_drop=0.0, reverse_probability=0.0, workers=0)
        mesh, count = sharding.make_mesh(config.mesh), -(-config.evaluation.validate // config.train.batch)
        batches = [sharding.put_batch(mesh, numeric(self.prepare(next(loader)))) for _ in range(count)]
        loader.close()
        return batches

    @functools.cached_property
    def _validation_error(self):
        @nnx.jit
        def error(model, batch, key):
            batch = batch | self.encode(model, batch)
            coefficients = model.basis.coefficients(batch.get("query"), batch["latents"].shape[0])
            return self._denoising_error(model, batch, key, coefficients)

        return error

    def keep(self, model, folder: Path) -> None:
        """The basis as a run of its own, which every command takes: runs/basis/best."""
        write_run(folder, model.basis.config, arrays_of(model.basis))

    def log_images(self, model, step: int) -> dict[str, np.ndarray | float]:
        """For each split a, a′, b, the result and the truth; and how the members of the basis are used."""
        if not self.config.evaluation.tasks:
            return {}
        pipeline, images = Pipeline(self.folder, model, self.precomputed), {}
        for split in self.tasks:
            samples = self._samples(split, 1, self.config.evaluation.tasks)
            images[split] = rows_sheet(samples, {"result": edit_samples(pipeline, samples, **self.sampling)})
        if self.basis_config.coefficients.from_images:
            images |= self._router(pipeline)
        if self.precomputed:
            self.precomputed.release()
        return images

    def _router(self, pipeline: Pipeline) -> dict[str, np.ndarray | float]:
        """Of two analogies of every training task: shares of the members by task and by layer, analogies on a plane by
        their coefficients, and the numbers of members in effect (evaluation/routing.py)."""
        samples = self._samples("train", 2)
        coefficients = probes.route(pipeline, samples)
        routing = routing_of(
            {path: np.moveaxis(c, 1, 0) for path, c in coefficients.items()}, [sample.task for sample in samples]
        )
        members, tasks = [str(n) for n in range(routing.members)], list(routing.weights)
        shown = routing.layers[:: -(-len(routing.layers) // LAYERS_SHOWN)]
        layers = [f"{layer.path} {layer.block}" for layer in shown]
        images: dict[str, np.ndarray | float] = {
            "router": heat_map(np.stack(list(routing.weights.values())), tasks, members, "mean of all layers"),
            "router_layers": heat_map(np.stack([layer.usage for layer in shown]), layers, members, "all tasks"),
            "router_plane": plane(routing.place, routing.tasks, f"{routing.explained:.0%} of the variance"),
        }
        one, task, together = routing.effective()
        numbers = {"one_analogy": one, "one_task": task, "all_tasks": together}
        images |= {f"router/effective_members/{name}": value for name, value in numbers.items()}
        images["router/unused_members"] = routing.unused()
        return images

    def finish(self, model, workdir: Path) -> None:
        """Writes the basis in the published format, if that can hold it (an ordinary LoRA if nothing is routed); then
        tables, sheets and a list of unusable data files, whose failure doesn't end the run."""
        pipeline = Pipeline(self.folder, model, self.precomputed)
        config = model.basis.config
        if config.coefficients.has_router:
            if reason := unpublishable(config):
                print(f"no export: {reason}; this folder is as good as one for every command", flush=True)
            else:
                pipeline.save_basis(workdir / "export" / "basis.safetensors")
            if config.encoder_sketch:
                write_json(workdir / ENCODER, {"name": config.encoder, "sketch": config.encoder_sketch})
        else:
            mix = pipeline.mix(config.coefficients.default)
            pipeline.save_lora(workdir / "export" / "lora.safetensors", mix, dtype="float16")
        if len(self.problems):
            with report_only("problems.json"):
                self.problems.write(workdir / "problems.json")
                print(self.problems.summary(), flush=True)
        for split in (list(self.tasks)[1:] or ["train"]) if self.config.evaluation.per_task else ():
            with report_only(f"the table of {split}"):
                table = evaluate_pipeline(
                    pipeline,
                    self._samples(split, self.config.evaluation.per_task),
                    workdir / "evaluation" / split,
                    **self.sampling,
                )
                print(f"{split}:\n{table.text()}", flush=True)
