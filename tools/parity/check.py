"""All checks of a folder of recordings."""

from pathlib import Path

import jax

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.hub_cache import PIPELINE_FILES, resolve
from parity.edit import check_edit
from parity.flow import check_scheduler
from parity.folder import Bases, RecordedModels, read_recording
from parity.images import check_external_query, check_grid
from parity.pair.check import check_pair
from parity.report import Comparison
from parity.training import check_train_step
from parity.transformer import check_case


def check_folder(folder: Path, pipeline_folder: Path | None = None) -> int:
    """Check everything found in `folder`, print the lines, and return the exit status (1: a failure, or nothing
    found). The pipeline is folder/tiny_pipeline where none is given, or beside the folder for recordings of Pair
    Customization. Raises UserError if a folder isn't there."""
    if pipeline_folder is not None:
        pipeline_folder = resolve(pipeline_folder, PIPELINE_FILES, "the folder of the models", ("transformer",))
    for path in (folder, pipeline_folder):
        if path is not None and not path.is_dir():
            raise UserError(f"{path} is not a folder; give an existing one")
    of_pair = (folder / "cases.json").is_file()
    if pipeline_folder is None:
        # Recordings of Pair Customization lie beside the models that they were made with.
        there = [place / "tiny_pipeline" for place in (folder, *([folder.parent] if of_pair else []))]
        pipeline_folder = next((place for place in there if place.is_dir()), None)
    report, models = Comparison(), RecordedModels(pipeline_folder)
    # Hardware with narrower matrix units (TF32, bfloat16 passes) is asked for full float32 products.
    with jax.default_matmul_precision("highest"):
        if of_pair:
            check_pair(report, folder, models, lambda path, check: _check_file(report, path, check, ()))
            return report.summary()
        bases = Bases(folder, models, report)
        kinds = [
            ("grid.npz", check_grid, ()),
            ("scheduler.npz", lambda *given: check_scheduler(*given, models.schedule), ()),
            ("external_query.npz", check_external_query, (models,)),
            ("case_*.npz", check_case, (bases, models)),
            ("train_step.npz", check_train_step, (bases, models)),
            ("e2e_*.npz", check_edit, (bases, models)),
        ]
        for pattern, check, needed in kinds:
            for path in sorted(folder.glob(pattern)):
                _check_file(report, path, check, needed)
    if not report.passed + report.failed + report.skipped:
        report.write(
            f"{folder} holds no recordings (grid.npz, scheduler.npz, external_query.npz, case_*.npz, "
            "train_step.npz, e2e_*.npz) and no basis_*.safetensors"
        )
    return report.summary()


def _check_file(report: Comparison, path: Path, check, needed) -> None:
    before = report.passed + report.failed + report.skipped + report.deviations
    try:
        check(report, path.stem, read_recording(path), *needed)
    except UserError as error:
        report.fail(path.name, str(error))
    except Exception as error:  # as in Comparison.compare: what a recording holds is not ours to foresee
        report.fail(path.name, f"has an unexpected content ({type(error).__name__}: {error})")
    if report.passed + report.failed + report.skipped + report.deviations == before:
        report.fail(path.name, "holds nothing that is known here; see the names in the golden data's README")
