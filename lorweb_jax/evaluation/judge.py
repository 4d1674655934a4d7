"""A vision-language model as the judge (method.md section 9): two scores from 1 to 10 for each result, and a forced
choice between two methods. Answers are kept by what was asked, so that nothing is asked twice."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.schema import json_value, read_json
from lorweb_jax.evaluation.chat import Judge, Unanswered
from lorweb_jax.evaluation.metrics import task_means, wilson_interval
from lorweb_jax.evaluation.records import write_json
from lorweb_jax.evaluation.results import Evaluated
from lorweb_jax.evaluation.samples import Sample
from lorweb_jax.evaluation.statistics import estimate

ASPECTS = ("accuracy", "consistency")
_ANALOGY = """A visual analogy: image A is edited into image A'. The same edit is to be made to image B.{caption}"""
_SCORES = (
    _ANALOGY
    + """
Judge the RESULT. accuracy: how well B was changed in the way that A was changed into A'. consistency: how well all that
the edit doesn't concern was kept as it is in B. Both are whole numbers from 1 (worst) to 10 (best).
Answer with this JSON object and nothing else: {{"accuracy": 1-10, "consistency": 1-10}}"""
)
_CHOICE = (
    _ANALOGY
    + """
Two programs tried. Which result is better: the edit of A to A' made to B, and all else of B kept? You must choose one.
Answer with this JSON object and nothing else: {{"choice": 1}} or {{"choice": 2}}"""
)


class Question(NamedTuple):
    """about: (method, id) of a score, (shown first, shown second, id) of a choice. parse: text -> answer, or
    ValueError."""

    about: tuple[str, ...]
    body: dict[str, Any]
    parse: Callable[[str], Any]


class Answers(NamedTuple):
    """{about: answer} of the questions answered, {about: why} of the others."""

    answered: dict[tuple[str, ...], Any]
    unanswered: dict[tuple[str, ...], str]


def parse_scores(text: str) -> dict[str, int]:
    """Exactly {"accuracy": n, "consistency": n}, 1 ≤ n ≤ 10 whole; ValueError for anything else."""
    answer = _strict(text, set(ASPECTS))
    for value in answer.values():
        if type(value) is not int or not 1 <= value <= 10:
            raise ValueError(f"a score is {value!r}, not a whole number from 1 to 10")
    return answer


def parse_choice(text: str) -> int:
    """Exactly {"choice": 1} or {"choice": 2} -> 1 or 2; ValueError for anything else."""
    value = _strict(text, {"choice"})["choice"]
    if type(value) is not int or value not in (1, 2):
        raise ValueError(f"the choice is {value!r}, not 1 or 2")
    return value


def _strict(text: str, keys: set[str]) -> dict[str, Any]:
    answer = json_value(text)
    if not isinstance(answer, dict) or set(answer) != keys:
        raise ValueError(f"not an object with {' and '.join(sorted(keys))} alone")
    return answer


def score_question(endpoint: Judge, method: str, key: str, sample: Sample, result: np.ndarray) -> Question:
    body = endpoint.question(_SCORES.format(caption=_caption(sample)), [*_shown(sample), ("RESULT", result)])
    return Question((method, key), body, parse_scores)


def choice_question(
    endpoint: Judge, pair: tuple[str, str], key: str, sample: Sample, results: Mapping[str, np.ndarray]
) -> Question:
    """The two results in an order drawn from the pair and the triplet, so that the same question is asked again."""
    drawn = hashlib.sha256("\0".join([*sorted(pair), key]).encode(errors="replace")).digest()[0] % 2
    first, second = sorted(pair, reverse=bool(drawn))
    images = [*_shown(sample), ("RESULT 1", results[first]), ("RESULT 2", results[second])]
    return Question(
        (first, second, key), endpoint.question(_CHOICE.format(caption=_caption(sample)), images), parse_choice
    )


def _caption(sample: Sample) -> str:
    return f' In words: "{sample.caption}".' if sample.caption else ""


def _shown(sample: Sample) -> list[tuple[str, np.ndarray]]:
    return [("Image A", sample.a), ("Image A'", sample.a2), ("Image B", sample.b)]


def ask_all(endpoint: Judge, questions: Iterable[Question], cache: Path, concurrency: int = 4) -> Answers:
    """Ask what isn't in the folder `cache`, `concurrency` at a time; each answer is written there as it comes.

    Questions without an answer are not kept: the next call asks them again. An error that concerns every question
    ends it, and what was answered stays. Raises UserError as `Endpoint.ask` does.
    """
    answers = Answers({}, {})

    def ask(question: Question) -> tuple[Question, Any, str | None]:
        path = cache / f"{endpoint.digest(question.body)}.json"
        if path.exists():
            try:
                return question, question.parse(json.dumps(read_json(path)["answer"])), None
            except (UserError, ValueError, KeyError):
                pass  # damaged: it is asked again
        try:
            answer = endpoint.ask(question.body, question.parse)
        except Unanswered as error:
            return question, None, str(error)
        stored = answer if isinstance(answer, dict) else {"choice": answer}
        write_json(path, {"model": endpoint.model, "about": list(question.about), "answer": stored})
        return question, answer, None

    with ThreadPoolExecutor(concurrency) as pool:
        waiting = iter(questions)
        # No more than a few questions, with their images, are in memory at once.
        while chunk := list(itertools.islice(waiting, 8 * concurrency)):
            futures = [pool.submit(ask, question) for question in chunk]
            try:
                for future in futures:
                    question, answer, reason = future.result()
                    if reason is None:
                        answers.answered[question.about] = answer
                    else:
                        answers.unanswered[question.about] = reason
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return answers


def judge(
    data: Evaluated,
    samples: Mapping[str, Sample],
    endpoint: Judge,
    cache: Path,
    *,
    concurrency: int = 4,
    tell: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Scores of every method but copy and the truth, and forced choices of the first of them against each other one.

    Returns what results.json has under "judge". Raises UserError where the endpoint refuses every question, and where
    none at all got an answer.
    """
    names = [name for name in data.compared if data.methods[name].about["kind"] != "copy"]
    images = lambda name, key: data.methods[name].image(key, data.records[name][key])
    scored = ask_all(
        endpoint,
        (score_question(endpoint, name, key, samples[key], images(name, key)) for name in names for key in samples),
        cache,
        concurrency,
    )
    pairs = [(names[0], other) for other in names[1:]]
    chosen = ask_all(
        endpoint,
        (
            choice_question(endpoint, pair, key, samples[key], {name: images(name, key) for name in pair})
            for pair in pairs
            for key in samples
        ),
        cache,
        concurrency,
    )
    unanswered = scored.unanswered | chosen.unanswered
    if unanswered:
        reason = next(iter(unanswered.values()))
        if not scored.answered and not chosen.answered:
            raise UserError(f"the judge at {endpoint.url} answered none of {len(unanswered)} questions ({reason})")
        tell(f"the judge left {len(unanswered)} questions unanswered ({reason}); the same command asks them again")
    tasks = {key: data.task(key) for key in data.triplets}
    return {
        "model": endpoint.model,
        "scores": {name: _scores(name, scored, tasks) for name in names},
        "choices": [_choice(pair, chosen) for pair in pairs],
    }


def _scores(name: str, answers: Answers, tasks: Mapping[str, str]) -> dict[str, Any]:
    """Averaged per task, then over tasks, of those that were answered."""
    of = {key: answer for (method, key), answer in answers.answered.items() if method == name}
    result: dict[str, Any] = {
        "answered": len(of),
        "unanswered": sum(method == name for method, _ in answers.unanswered),
    }
    for aspect in ASPECTS if of else ():
        means = task_means([tasks[key] for key in of], [answer[aspect] for answer in of.values()])
        result[aspect] = (average := estimate(means)) and average.to_json()
    return result


def _choice(pair: Sequence[str], answers: Answers) -> dict[str, Any]:
    """How often the first of the pair was chosen, with Wilson's 68 % interval, of the answered ones."""
    won = [
        (first, second)[answer - 1] == pair[0]
        for (first, second, _), answer in answers.answered.items()
        if {first, second} == set(pair)
    ]
    low, high = wilson_interval(sum(won), len(won)) if won else (None, None)
    return {
        "method": pair[0],
        "against": pair[1],
        "rate": sum(won) / len(won) if won else None,
        "low": low,
        "high": high,
        "answered": len(won),
        "unanswered": sum({first, second} == set(pair) for first, second, _ in answers.unanswered),
    }
