"""The ways of making b′ that an evaluation compares, and the whole evaluation of one pipeline on some tasks."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorweb_jax.adapters.formats.pair_file import is_published
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation import probes
from lorweb_jax.evaluation.evaluate import Method, evaluate, rows_sheet
from lorweb_jax.evaluation.samples import Sample, batches
from lorweb_jax.evaluation.table import TRUTH, Table
from lorweb_jax.evaluation.words import PROBES, Named, parse_method
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.images.io import write_image
from lorweb_jax.pipeline.adapters import existing_basis, is_run, job_of
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.pipeline.styles import STRENGTH_DEFAULT

COPY, BASE = "copy b", "base, text only"
REFERENCES = {"copy": COPY, "base": BASE}  # words of the command line for what needs no file


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method whose results are kept as records.

    make(samples, seeds) -> b′ of each, uint8; samples of one size, a seed each. route(samples) -> the coefficients
    {path: [l, b, n]} that its router chooses, where it has one that chooses beforehand; blend(sample, coefficients,
    seed) -> b′ of one sample by each of several {path: [l, n]}. fingerprint: of its weights.
    parameters: of its adapter. kind: "copy", "base", "truth", "basis", "LoRA" or "style".
    """

    name: str
    kind: str
    make: Callable[[Sequence[Sample], Sequence[int]], list[np.ndarray]]
    fingerprint: str = ""
    source: str = ""
    parameters: int = 0
    route: Callable[[Sequence[Sample]], dict[str, np.ndarray]] | None = None
    blend: Callable[[Sample, Sequence[Mapping[str, np.ndarray]], int], list[np.ndarray]] | None = None

    def describe(self) -> dict:
        return {name: getattr(self, name) for name in ("kind", "source", "fingerprint", "parameters")}


def candidate(
    pipeline: Pipeline, text: str, *, config: Path | None = None, samples: Sequence[Sample] = (), **sampling
) -> Candidate:
    """The method of one word of the command line, as `parse_method` takes it.

    pipeline: the base. config: config.yaml of a published basis, if not beside it. samples: all that are evaluated, by
    which a probe (probes.py) chooses its coefficients. sampling: steps and guidance.
    Raises UserError for what holds no adapter, or one of another base.
    """
    named = parse_method(text)
    name, source = named.name, named.path
    if source is None:
        name = name or REFERENCES[named.text]
        if named.text == "copy":
            return Candidate(name, "copy", lambda samples, seeds: [sample.b for sample in samples], "copy")
        return Candidate(name, "base", _edits(pipeline, use_basis=False, **sampling), "base")
    if named.is_style or _is_pair(source):
        return _style(pipeline, named, source, sampling)
    attached = pipeline.attach(source, config)
    basis = attached.model.basis
    assert basis is not None  # attach gives one
    coefficients = basis.config.coefficients
    parameters = sum(array.size for parts in basis.to_arrays().values() for array in parts.values())
    probe = PROBES.get(named.probe, "") + ("" if named.strength is None else f" {named.strength:g}")
    name = name or ", ".join(filter(None, [_name(Path(source)), probe]))
    kind, fingerprint = "basis" if coefficients.has_router else "LoRA", basis.fingerprint()
    if named.strength is not None:
        make = _edits(attached, strength=named.strength, **sampling)
        return Candidate(name, kind, make, f"{fingerprint} {probe}", named.text, parameters)
    if named.probe:
        choose = probes.chooser(named.probe, attached, samples)

        def make(chosen: Sequence[Sample], seeds: Sequence[int]) -> list[np.ndarray]:
            return _edits(attached, mix=choose(chosen), **sampling)(chosen, seeds)

        return Candidate(name, kind, make, f"{fingerprint} {named.probe}", named.text, parameters)
    make = _edits(attached, **sampling)
    if not coefficients.from_images:
        return Candidate(name, kind, make, fingerprint, source, parameters)

    def blend(sample: Sample, coefficients: Sequence[Mapping[str, np.ndarray]], seed: int) -> list[np.ndarray]:
        mixes = [Mix(each, fingerprint) for each in coefficients]
        return _edits(attached, mix=mixes, **sampling)([sample] * len(mixes), [seed] * len(mixes))

    return Candidate(
        name, kind, make, fingerprint, source, parameters, lambda samples: probes.route(attached, samples), blend
    )


def truth() -> Candidate:
    """b′ itself, of samples that have one: what the scores say of a perfect answer."""
    return Candidate(TRUTH, "truth", lambda samples, seeds: [sample.truth for sample in samples], "truth")


def _name(path: Path) -> str:
    """A run by its folder, and a file called like every other of its kind by the run that it lies in."""
    if path.suffix == ".safetensors" and path.parent.name == "export":
        return path.parent.parent.name or path.stem
    return path.stem if path.suffix == ".safetensors" else path.name


def _is_pair(source: str) -> bool:
    """Whether it is a run of configs/pair.py or a published file of Pair Customization."""
    path = existing_basis(source)
    if is_run(path):
        return job_of(path) == "pair"
    return path.is_file() and path.suffix == ".safetensors" and is_published(Checkpoint(path))


def _style(pipeline: Pipeline, named: Named, path: str, sampling: dict) -> Candidate:
    strength = STRENGTH_DEFAULT if named.strength is None else named.strength
    style = pipeline.style(path, strength)
    arrays = [(key, part[key]) for part in (style.member.a, style.member.b) for key in sorted(part)]
    digest = hashlib.sha256(f"{style.strength} {style.words}".encode())
    for key, array in arrays:
        digest.update(key.encode() + np.ascontiguousarray(array, np.float32).tobytes())
    # Guided from the base by the instruction and the grid; without classifier-free guidance, as for the others.
    make = _edits(pipeline, use_basis=False, styles=[style], true_guidance=1.0, **sampling)
    parameters = sum(array.size for _, array in arrays)
    name = named.name or _name(Path(path))
    return Candidate(name, "style", make, digest.hexdigest()[:16], named.text, parameters)


def _edits(pipeline: Pipeline, **options):
    def make(samples: Sequence[Sample], seeds: Sequence[int]) -> list[np.ndarray]:
        conditions, captions = ([getattr(sample, part) for sample in samples] for part in ("condition", "caption"))
        return pipeline.edit_batch(conditions, captions, seed=list(seeds), **options)

    return make


def edit_samples(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch: int = 16,
    use_basis: bool = True,
) -> list[np.ndarray]:
    """b′ of every sample, `batch` at once, each from its caption and the noise of its position in the batch."""
    results: list[np.ndarray] = [samples[0].b] * len(samples)
    for chosen, padded in batches([sample.b for sample in samples], batch):
        images = pipeline.edit_batch(
            [samples[i].condition for i in padded],
            [samples[i].caption for i in padded],
            steps=steps,
            guidance=guidance,
            seed=seed,
            use_basis=use_basis,
        )
        for index, image in zip(chosen, images):
            results[index] = image
    return results


def methods(pipeline: Pipeline, **sampling) -> dict[str, Method]:
    """Copying b; the base without and with its basis, from the same noise. `sampling` as in `edit_samples`."""
    basis = pipeline.model.basis
    if basis is None:
        raise UserError("the pipeline has no basis to be evaluated; attach one first")
    name = "basis" if basis.config.coefficients.has_router else "LoRA"
    return {
        COPY: lambda samples: [sample.b for sample in samples],
        BASE: lambda samples: edit_samples(pipeline, samples, use_basis=False, **sampling),
        name: lambda samples: edit_samples(pipeline, samples, **sampling),
    }


def evaluate_pipeline(pipeline: Pipeline, samples: Sequence[Sample], out: Path, **sampling) -> Table:
    """Score copy, base and basis on the samples; write table.md, table.json and sheet.png into `out`."""
    table = evaluate(methods(pipeline, **sampling), samples, pipeline.image_encoder)
    table.write(out)
    results = {name: images for name, images in table.results.items() if name != COPY}  # b is shown as it is
    write_image(out / "sheet.png", rows_sheet(samples, results))
    return table
