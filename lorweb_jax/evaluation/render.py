"""results.json, results.md and report.html of a folder of records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_text
from lorweb_jax.common.schema import read_json
from lorweb_jax.evaluation.chat import Judge
from lorweb_jax.evaluation.judge import judge
from lorweb_jax.evaluation.records import Records, write_json
from lorweb_jax.evaluation.report import report
from lorweb_jax.evaluation.results import Evaluated, collect, figures, markdown
from lorweb_jax.evaluation.scores import Score

SCORES, JUDGED = "scores.json", "judge.json"


def add_descriptions(folder: Path, scores: Sequence[Score]) -> None:
    """scores.json: how each score that the records have is shown."""
    path = Path(folder) / SCORES
    known = read_json(path) if path.exists() else {}
    write_json(path, known | {score.name: score.describe() for score in scores})


def read_records(folder: str | Path, also: Sequence[str | Path] = ()) -> Evaluated:
    """The complete methods of one folder of records and of others made under the same conditions, as `collect`."""
    records = [Records(each) for each in (folder, *also)]
    path = Path(folder) / SCORES
    if not path.is_file():
        raise UserError(f"{folder} has no {SCORES}; give the command that made its images again")
    return collect(records, read_json(path))


def render(
    folder: str | Path, also: Sequence[str | Path] = (), endpoint: Judge | None = None, concurrency: int = 4
) -> str:
    """Write the three files into `folder`; returns the Markdown.

    endpoint: of a judge, who is asked what the folder judge/ has no answer to. Without one the report has what a judge
    said before of these methods. Raises UserError as `collect` and `judge` do.
    """
    folder = Path(folder)
    data, samples = read_records(folder, also), Records(folder).samples()
    path = folder / JUDGED
    if endpoint is not None:
        write_json(path, judge(data, samples, endpoint, folder / "judge", concurrency=concurrency))
    results = figures(data, _of_methods(read_json(path), data) if path.exists() else None)
    text = markdown(results)
    page = report(data, results, samples)
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", text)
    write_text(folder / "report.html", page)
    return text


def _of_methods(judged: Mapping[str, Any], data: Evaluated) -> dict[str, Any]:
    """What a judge said of methods that are in the report."""
    return {
        **judged,
        "scores": {name: of for name, of in judged["scores"].items() if name in data.methods},
        "choices": [each for each in judged["choices"] if {each["method"], each["against"]} <= set(data.methods)],
    }
