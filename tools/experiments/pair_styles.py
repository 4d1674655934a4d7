"""Pair Customization in miniature: how near does a style come to its known truth, and what does it cost the content?

  python tools/experiments/pair_styles.py --out runs/pair_styles            all of it (resumable)
  python tools/experiments/pair_styles.py --out runs/short --seeds 1 --pairs 1 --methods pair lora

Each pair is a drawing and its version after an operation that changes the look alone, or its twin that other people
drew. The base draws prompts from fixed noise; a method draws the same prompts from the same noise in the learned style.
For an operation the truth is known: the operation on the base's own picture. Methods are trained alike (steps, rank,
learning rate, unless said otherwise):

  pair       content and style adapter, the style's A orthogonal to the content's, alternating updates
  fast       the same at three times the learning rate: a frozen A leaves half of the numbers to learn
  free       pair with A's that are trained and not orthogonal
  joint      one update of both adapters at one point
  disjoint   content on the even blocks, style on the odd ones
  lora       one adapter, on the stylised image alone

Each is put on by style guidance at several strengths; "lora" also as people use it, by a weight of the adapter under
classifier-free guidance ("lora, weight"). Written are table.md, table.json, curves.png and a sheet for each pair.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402

from configs import pair as pair_config  # noqa: E402
from experiments.pair_tables import BASE, write_tables  # noqa: E402
from experiments.runner import Record, Trial, grid, run  # noqa: E402
from lorweb_jax.common.command_line import Parser, nonempty_path, positive  # noqa: E402
from lorweb_jax.common.errors import run_command  # noqa: E402
from lorweb_jax.data.embedded.drawing_sets import SETS, STYLE_WORDS, DrawingSets, load_sets, with_article  # noqa: E402
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white  # noqa: E402
from lorweb_jax.evaluation.lpips import lpips  # noqa: E402
from lorweb_jax.evaluation.metrics import clip_directional, mse  # noqa: E402
from lorweb_jax.images.io import write_image  # noqa: E402
from lorweb_jax.pipeline.pipeline import Pipeline  # noqa: E402
from lorweb_jax.processes.host_memory import keep_freed_memory  # noqa: E402

STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.5)
TRUE_GUIDANCE = 3.0
STEPS = 20  # of sampling


class Pair(NamedTuple):
    """A drawing by its name and set, and its style: an operation, or another set that has the same sign."""

    drawing: str
    drawn_in: str
    style: str
    words: str

    @property
    def name(self) -> str:
        return f"{self.drawing} {self.style}"


PAIRS = (
    Pair("dog", "openmoji", "filter_sepia", "in brown tones"),
    Pair("red apple", "noto", "lines_pencil", "in pencil"),
    Pair("rocket", "twemoji", "filter_invert", "as a negative"),
    Pair("house", "fluent", "pattern_diagonal", "behind bars"),
    Pair("teddy bear", "openmoji", "light_sunset", "at dusk"),
    Pair("cat face", "noto", "lines", "in ink"),
    Pair("automobile", "twemoji", "fluent", "in plastic"),
)
PROMPTS = ("robot", "sunflower", "house with garden", "grinning face", "sailboat", "banana", "elephant", "guitar")

METHODS: dict[str, dict[str, Any]] = {
    "pair": {},
    "fast": {"optimizer.learning_rate": 3e-3},
    "free": {"pair.orthogonal": False},
    "joint": {"pair.joint": True},
    "disjoint": {
        "pair.double_content": "even",
        "pair.single_content": "even",
        "pair.double_style": "odd",
        "pair.single_style": "odd",
    },
    "lora": {"pair.double_content": "none", "pair.single_content": "none", "pair.style_start": 0},
}


class Study:
    """What all trials share: the base, its drawings, the pictures that styles are put on, and their noise."""

    def __init__(self, folder: Path, drawings: DrawingSets, out: Path, steps: int):
        self.folder, self.drawings, self.out, self.steps = folder, drawings, out, steps
        self.pipeline = Pipeline.load(folder)
        self.side = drawings.images.shape[1]

    def find(self, name: str, set_name: str) -> int:
        """The index of a drawing."""
        return next(
            i
            for i, each in enumerate(self.drawings.names)
            if each == name and SETS[self.drawings.set_of[i]] == set_name
        )

    @functools.cache  # noqa: B019  one study a process
    def images(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """Content image and stylised image, uint8 [h, w, 3]."""
        index = self.find(pair.drawing, pair.drawn_in)
        content = self.drawings.images[index]
        if pair.style in OPERATIONS:
            return on_white(content), OPERATIONS[pair.style].apply(content)
        twin = self.drawings.images[self.drawings.twins[index, SETS.index(pair.style)]]
        return on_white(content), on_white(twin)

    def trial(self, labels: dict[str, Any]) -> Trial:
        pair = pair_named(labels["pair"])
        files = {}
        for role, image in zip(("content", "style"), self.images(pair)):
            files[role] = self.out / "images" / f"{pair.name.replace(' ', '-')}_{role}.png"
            write_image(files[role], image)
        config = pair_config.get_config()
        config.pipeline, config.seed = str(self.folder), labels["seed"]
        config.data.update({role: str(file) for role, file in files.items()})
        config.data.caption = prompt_of(f"sbu {pair.drawing}", pair.drawn_in)
        config.data.style_words = pair.words
        config.train.steps = config.train.checkpoint_every = config.train.log_images_every = self.steps
        config.pair.style_start = self.steps * 3 // 8
        config.update_from_flattened_dict(METHODS[labels["method"]])
        return Trial(labels, config)

    @functools.cache  # noqa: B019
    def plain(self, drawn_in: str) -> np.ndarray:
        """What the base draws of all prompts in the look of a set, uint8 [prompts, h, w, 3]."""
        with self.pipeline.session() as session:
            return self.drawn(session, drawn_in)

    def drawn(self, session, drawn_in: str, words: str = "", **options) -> np.ndarray:
        prompts = [f"{prompt_of(name, drawn_in)} {words}".strip() for name in PROMPTS]
        return np.stack(
            session.generate_batch(
                prompts,
                size=(self.side, self.side),
                steps=STEPS,
                guidance=2.5,
                true_guidance=TRUE_GUIDANCE,
                seed=1,
                **options,
            )
        )

    def measure(self, trial: Trial, run_folder: Path) -> Record:
        """Distances of all prompts' pictures, by way of putting the style on and by how much."""
        pair = pair_named(trial.labels["pair"])
        style = self.pipeline.style(run_folder)
        shown, rows = {}, {}
        with self.pipeline.session(styles=style) as session:
            for strength in STRENGTHS:
                images = self.drawn(session, pair.drawn_in, strengths=[strength], style_start=STEPS // 5)
                shown[f"strength {strength:g}"] = images
        if trial.labels["method"] == "lora":
            file = run_folder / "export" / "style_lora.safetensors"
            attached = self.pipeline.attach(file)
            for weight in WEIGHTS:
                with attached.session(weight * attached.mix(0)) as session:
                    shown[f"weight {weight:g}"] = self.drawn(session, pair.drawn_in, pair.words)
        for name, images in shown.items():
            rows[name] = self.distances(pair, images)
        write_image(self.out / "sheets" / f"{trial.name}.png", self._sheet(pair, shown))
        return {"distances": rows}

    def unchanged(self, name: str) -> Record:
        """A record of the base's own pictures."""
        pair = pair_named(name)
        distances = {"unchanged": self.distances(pair, self.plain(pair.drawn_in))}
        return {"labels": {"seed": 0, "pair": name, "method": BASE}, "seconds": 0.0, "distances": distances}

    def distances(self, pair: Pair, images: np.ndarray) -> dict[str, list[float]]:
        """By prompt. To the truth, where it is known: "mse" (pixels as 0..1) and "lpips". "content": LPIPS to what
        the base drew. "style": the cosine between the change of the image encoder's embedding from the base's
        picture on and that from the content image to the stylised one. "example": LPIPS to the stylised image of the
        pair, small where that is drawn in place of what the prompt says."""
        before = self.plain(pair.drawn_in)
        embedded, embedded_before = self.embed(images), self.embed(before)
        content, styled = (self.embed(image[None]) for image in self.images(pair))
        example = np.repeat(self.images(pair)[1][None], len(images), 0)
        distances = {
            "content": lpips(images, before).tolist(),
            "example": lpips(images, example).tolist(),
            "style": clip_directional(embedded - embedded_before, np.repeat(styled - content, len(images), 0)).tolist(),
        }
        if pair.style in OPERATIONS:
            truth = self.truth(pair)
            distances |= {"mse": [mse(*two) for two in zip(images, truth)], "lpips": lpips(images, truth).tolist()}
        return distances

    @functools.cache  # noqa: B019
    def truth(self, pair: Pair) -> np.ndarray:
        """The operation on the base's own pictures."""
        opaque = np.full((*self.plain(pair.drawn_in).shape[:3], 1), 255, np.uint8)
        rgba = np.concatenate([self.plain(pair.drawn_in), opaque], axis=-1)
        return np.stack([OPERATIONS[pair.style].apply(image) for image in rgba])

    def embed(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.pipeline.image_encoder.embed(list(images)), np.float64)

    def _sheet(self, pair: Pair, shown: dict[str, np.ndarray]) -> np.ndarray:
        from lorweb_jax.images.pictures import sheet

        rows = [("the pair", list(self.images(pair))), ("base", list(self.plain(pair.drawn_in)))]
        if pair.style in OPERATIONS:
            rows.append(("truth", list(self.truth(pair))))
        return sheet([*rows, *((name, list(images)) for name, images in shown.items())], PROMPTS)


def prompt_of(name: str, drawn_in: str) -> str:
    return f"a drawing of {with_article(name)} in {STYLE_WORDS[drawn_in]} style"


def pair_named(name: str) -> Pair:
    return next(pair for pair in PAIRS if pair.name == name)


def parse(arguments: Sequence[str] | None):
    parser = Parser(prog="python tools/experiments/pair_styles.py", description=__doc__)
    parser.add_argument("--pipeline", type=nonempty_path, default=Path("assets/small_kontext"), help="the base")
    parser.add_argument("--drawings", type=nonempty_path, default=Path("local_data/drawings64.npz"))
    parser.add_argument("--out", type=nonempty_path, required=True, help="folder of records, sheets and tables")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--pairs", type=positive, default=len(PAIRS), help="the first so many of the pairs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=positive, default=400, help="updates of each trial (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    keep_freed_memory()
    study = Study(args.pipeline, load_sets(args.drawings), args.out, args.steps)
    pairs = [pair.name for pair in PAIRS[: args.pairs]]
    trials = [study.trial(labels) for labels in grid(seed=range(args.seeds), pair=pairs, method=args.methods)]
    records = run(trials, args.out, study.measure)
    print(write_tables([*(study.unchanged(pair) for pair in pairs), *records], args.out))


if __name__ == "__main__":
    run_command(main)
