"""The paper's claims in miniature: does a basis of LoRAs with a router beat one LoRA of the same rank?

  make experiments ARGS="--groups main"                                  the main comparison (resumable)
  python tools/experiments/basis.py --out runs/experiments               all of it, the main comparison first
  python tools/experiments/basis.py --out runs/experiments --only-tables the tables of what is there so far
  python tools/experiments/basis.py --out runs/short --groups main --seeds 1 --set train.steps=40 --rates 2e-3

Each experiment is a training run and an evaluation of it by the scores of `python -m lorweb_jax.evaluate`, on analogies
of tasks that were trained on and of tasks that were not. All methods of a group train for the same steps on the same
data in the same order, from the same seeds; those of one seed are sampled from the same noise. The learning rate of the
basis and of each LoRA is chosen first, by LPIPS on training analogies of training tasks alone, with seed 0: it is
doubled and halved as long as that helps. Variants of the basis take the basis's.

OUT/records has a record of each run and of each further measurement, OUT/trained the trained bases, which every command
takes for runs, OUT/evaluation/seed_S what was sampled (`python -m lorweb_jax.evaluate --out OUT/evaluation/seed_0`
makes a report of it), OUT/results.json and results.md what comes of them, unseen.png and tasks.png pictures of the main
comparison. --docs writes the tables into docs/results.md too, and the pictures beside it.
"""

import functools
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from experiments.basis_methods import GROUPS, METHODS, PROBES  # noqa: E402
from experiments.runner import Record, Trial, run  # noqa: E402
from lorweb_jax.common.command_line import Parser, nonempty_path, positive  # noqa: E402
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402
from lorweb_jax.common.schema import read_json  # noqa: E402
from lorweb_jax.files.safetensors_io import write_json  # noqa: E402
from lorweb_jax.main import read_config, set_field  # noqa: E402
from lorweb_jax.settings import config as configs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
UNSEEN = 3  # times as many analogies of a task that wasn't trained on: there are fewer of these
RATE_STEPS = 4  # most doublings or halvings of a learning rate


class Study:
    """What all trials share: the config, the data, the base, and where results lie."""

    def __init__(self, config, out: Path):
        from lorweb_jax.data.problems import Problems
        from lorweb_jax.data.splits import read_splits

        self.out, self.per_task = out, config.evaluation.per_task
        self.sampling = {name: config.evaluation[name] for name in ("steps", "guidance")}
        self.batch = config.evaluation.batch
        # What a run reports of itself is measured here instead.
        config.evaluation.tasks = config.evaluation.per_task = 0
        config.precomputed = str(out / "precomputed")
        self.config, self.problems = config, Problems()
        self.tasks = read_splits(config, self.problems)

    def config_of(self, method: str, rate: float, seed: int):
        config = self.config.copy_and_resolve_references()
        METHODS[method].apply(config)
        config.optimizer.learning_rate, config.seed = rate, seed
        configs.check(config)
        return config

    def trial(self, method: str, rate: float, seed: int) -> Trial:
        return Trial({"method": method, "rate": rate, "seed": seed}, self.config_of(method, rate, seed))

    def precompute(self, methods: Sequence[str]) -> None:
        """Text embeddings and queries of all methods, once."""
        from lorweb_jax.precomputed.fill import precompute
        from lorweb_jax.precomputed.scope import Scope

        done = set()
        for method in methods:
            config = self.config_of(method, self.config.optimizer.learning_rate, 0)
            kept = Scope.of(config, self.pipeline.folder, self.tasks).queries_kept
            if kept not in done:
                precompute(config)
            done.add(kept)

    @functools.cached_property
    def pipeline(self):
        from lorweb_jax.pipeline.pipeline import Pipeline

        return Pipeline.load(self.config.pipeline, self.config.basis.encoder or None)

    @functools.cached_property
    def scores(self):
        from lorweb_jax.evaluation import scores

        return scores.standard(self.pipeline.image_encoder)

    @functools.cache  # noqa: B019  one study a process
    def samples(self, wording: str):
        """Analogies of all splits, the same for every method.

        wording: of their instructions. "reduced": as the data have them, which of the embedded data leave the parameter
        open; "full": with the parameter, of the embedded data alone; "none": empty.
        """
        from lorweb_jax.data.buckets import quadrant_shapes
        from lorweb_jax.data.embedded.operations import OPERATIONS
        from lorweb_jax.evaluation.samples import read_samples

        if wording != "reduced":
            try:
                return [
                    replace(each, caption=OPERATIONS[each.task].specific[0] if wording == "full" else "")
                    for each in self.samples("reduced")
                ]
            except KeyError as error:
                raise UserError(
                    f"only embedded data have full instructions, not the task {error}; leave the group out"
                ) from None
        largest = max((2 * max(shape) for shape in quadrant_shapes(self.config.data)), default=None)
        return [
            replace(sample, split=split)
            for split, tasks in self.tasks.items()
            for sample in read_samples(tasks, self.analogies(split), self.problems, largest)
        ]

    def analogies(self, split: str) -> int:
        """How many of each task: fewer of tasks that only choose learning rates, more of those that are few."""
        if split == "train":
            return max(1, self.per_task // 2)
        return self.per_task * (UNSEEN if split == "held_out_tasks" else 1)

    def scores_of(self, word: str, seed: int, wording: str = "reduced") -> dict:
        """{split: {task: {score: mean over its analogies}}} of a method, as `lorweb_jax.evaluate` keeps it."""
        from lorweb_jax.evaluation.making import add_coefficients, add_scores, conditions, make_images
        from lorweb_jax.evaluation.methods import candidate
        from lorweb_jax.evaluation.metrics import task_means
        from lorweb_jax.evaluation.records import Records
        from lorweb_jax.evaluation.render import add_descriptions

        samples = self.samples(wording)
        folder = self.out / "evaluation" / (f"seed_{seed}" + (f"_{wording}" if wording != "reduced" else ""))
        records = Records.begin(folder, samples, conditions(self.pipeline, **self.sampling, seed=seed))
        add_descriptions(folder, self.scores)
        method = candidate(self.pipeline, word, samples=samples, **self.sampling)
        kept = make_images(records, method, samples, seed=seed, batch=self.batch)
        add_scores(kept, {sample.id: sample for sample in samples}, self.scores)
        add_coefficients(kept, method, samples, self.batch)
        there, by_split = kept.read(), {}
        for split in self.tasks:
            chosen = [sample for sample in samples if sample.split == split]
            tasks = [sample.task for sample in chosen]
            means = {
                score.name: task_means(tasks, [there[sample.id]["scores"][score.name] for sample in chosen])
                for score in self.scores
            }
            by_split[split] = {task: {name: of[task] for name, of in means.items()} for task in dict.fromkeys(tasks)}
        return by_split

    def measure(self, trial: Trial, run_folder: Path) -> Record:
        """The trained basis is kept, without what a run needs to go on; its scores."""
        from lorweb_jax.pipeline.adapters import basis_of_run, write_run

        config, arrays = basis_of_run(run_folder)
        kept = self.out / "trained" / trial.name
        shutil.rmtree(kept, ignore_errors=True)  # of a measurement that was broken off
        write_run(kept, config, arrays)
        parameters = sum(array.size for parts in arrays.values() for array in parts.values())
        scores = self.scores_of(f"{trial.name}={kept}", trial.labels["seed"])
        return {"parameters": parameters, "scores": scores, "router": self.router_of(trial)}

    def router_of(self, trial: Trial) -> Record | None:
        """How many members a basis uses in effect, averaged over layers; None where nothing is routed beforehand."""
        from lorweb_jax.evaluation.making import COEFFICIENTS
        from lorweb_jax.evaluation.records import Records
        from lorweb_jax.evaluation.routing import read_routing

        records = Records(self.out / "evaluation" / f"seed_{trial.labels['seed']}")
        path = records.method(trial.name).folder / COEFFICIENTS
        if not path.exists():
            return None
        routing = read_routing(path, {sample.id: sample.task for sample in self.samples("reduced")})
        one, task, together = routing.effective()
        return {"members": routing.members, "one": one, "task": task, "all": together, "unused": routing.unused()}

    def record(self, method: str, word: str, seed: int, wording: str = "reduced") -> None:
        """Scores of what needs no training of its own, unless there is a record of them; UserError if that is of
        another measurement."""
        path = self.out / "records" / f"{method}_{seed}.json"
        of = {"word": word, "wording": wording, "per_task": self.per_task, **self.sampling}
        if not path.is_file():
            scores = self.scores_of(word, seed, wording)
            write_json(path, {"labels": {"method": method, "seed": seed}, "of": of, "scores": scores})
        elif read_json(path).get("of") != of:
            raise UserError(f"{path} is of another measurement than {of}; delete it, or give another --out")

    def probe(self, name: str, trials: Sequence[Trial], seeds: Iterable[int]) -> None:
        """Records of a probe of what the trials of its method trained, or of the base."""
        kind, of, wording = PROBES[name].kind, PROBES[name].of, PROBES[name].wording
        if of == "base":
            for seed in seeds:
                self.record(name, "base", seed, wording)
        for trial in (trial for trial in trials if trial.labels["method"] == of):
            trained = self.out / "trained" / trial.name
            self.record(
                name, f"{name}={kind}:{trained}" if kind else f"{name}={trained}", trial.labels["seed"], wording
            )

    def rate(self, method: str, start: float) -> float:
        """The learning rate with the least LPIPS on training analogies after a run with seed 0."""
        from experiments.basis_tables import mean_score

        def error(rate: float) -> float:
            [record] = run([self.trial(method, rate, 0)], self.out, self.measure)
            distance = mean_score(record["scores"]["train"], "lpips")
            return distance if math.isfinite(distance) else math.inf

        return climb(error, start)


def climb(error: Callable[[float], float], start: float) -> float:
    """Doubles `start` as long as the error falls, or else halves it as long as it falls: the best that was tried."""
    errors = {start: error(start)}
    for factor in (2.0, 0.5):
        best = min(errors, key=errors.__getitem__)
        if best != start:
            break
        for _ in range(RATE_STEPS):
            errors[best * factor] = error(best * factor)
            if errors[best * factor] >= errors[best]:
                break
            best *= factor
    return min(errors, key=errors.__getitem__)


def parse(arguments: Sequence[str] | None):
    parser = Parser(prog="python tools/experiments/basis.py", description=__doc__)
    parser.add_argument("--out", type=nonempty_path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="in this order")
    parser.add_argument(
        "--seeds", type=positive, help="of each method (default: 5 of the main comparison, 3 of others)"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="of the groups, these alone")
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "basis.py"), metavar="FILE[:VARIANT]", help="of the basis"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values for fields of it")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="learning rates of the methods that have a sweep (basis, lora_nr, lora_r), in its place; one serves all",
    )
    parser.add_argument("--only-tables", action="store_true", help="train nothing")
    parser.add_argument("--docs", type=nonempty_path, metavar="FILE", help="Markdown page that takes the tables")
    return parser.parse_args(arguments)


def rates_of(study: Study, given: Sequence[float] | None, methods: Sequence[str]) -> dict[str, float]:
    """{method: learning rate} of those methods that have a sweep and of those that others take theirs from."""
    swept = [name for name, method in METHODS.items() if not method.rate_of]
    if given is not None:
        if len(given) not in (1, len(swept)):
            raise UserError(f"--rates has {len(given)} values; give one, or one each for {', '.join(swept)}", 2)
        return dict(zip(swept, given * len(swept) if len(given) == 1 else given))
    needed = {METHODS[name].rate_of or name for name in methods}
    return {name: study.rate(name, study.config.optimizer.learning_rate) for name in swept if name in needed}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    from experiments.basis_tables import write_tables
    from lorweb_jax.processes.host_memory import keep_freed_memory

    if not args.only_tables:
        keep_freed_memory()
        config = read_config(args.config)
        for option in args.set:
            set_field(config, option)
        configs.check(config)
        study = Study(config, args.out)
        for group in args.groups:
            methods = [name for name in GROUPS[group].methods if args.methods is None or name in args.methods]
            seeds = range(args.seeds or GROUPS[group].seeds)
            study.precompute(methods)
            for seed, word in itertools.product(seeds, GROUPS[group].references):
                study.record(word, word, seed)
            rates = rates_of(study, args.rates, methods)
            # A seed after the other, so that what is there at any time can be compared.
            trials = [
                study.trial(name, rates[METHODS[name].rate_of or name], seed) for seed in seeds for name in methods
            ]
            run(trials, args.out, study.measure)
            for name in GROUPS[group].probes:
                study.probe(name, trials, seeds)
            write_tables(args.out, args.docs)  # of what is there, while the next group runs
    print(write_tables(args.out, args.docs))


if __name__ == "__main__":
    run_command(main)
