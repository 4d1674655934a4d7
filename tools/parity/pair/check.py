"""All checks of a folder of recordings of Pair Customization, which its cases.json tells."""

from pathlib import Path

import numpy as np

from lorweb_jax.common.schema import read_json
from lorweb_jax.data import pair as pair_data
from parity.folder import RecordedModels, Recording
from parity.pair.adapters import Adapters, check_file, check_forward, check_rows
from parity.pair.sampling import check_end_to_end, check_sample, check_schedule
from parity.pair.training import check_train
from parity.report import EXACT, Comparison, Tolerance

PIXELS = Tolerance(2e-6, relative=False)
_RATIOS = {"default": "as it is"}  # names that the recordings have for keys of pair.RATIOS


def check_pair(report: Comparison, folder: Path, models: RecordedModels, check_recording) -> None:
    """check_recording(path, check): runs check(report, name, data) of one .npz."""
    cases, adapters = read_json(folder / "cases.json"), Adapters(folder, models)
    for path in sorted(folder.glob("*.safetensors")):
        check_file(report, path, adapters)
    kinds = {
        "qr": lambda case: check_rows,
        "augment": lambda case: check_augment,
        "schedule": lambda case: lambda *given: check_schedule(*given, models),
        "forward_*": lambda case: lambda *given: check_forward(*given, adapters, cases["forward"][case][0]),
        "train_*": lambda case: lambda *given: check_train(*given, cases["train"][case], models),
        "sample_*": lambda case: lambda *given: check_sample(*given, adapters, models, cases["sample"][case]),
        "e2e_style*": lambda case: lambda *given: _end_to_end(*given, adapters, models, cases["e2e_style"]),
    }
    for pattern, check in kinds.items():
        for path in sorted(folder.glob(f"{pattern}.npz")):
            check_recording(path, check(path.stem.partition("_")[2]))


def _end_to_end(report, name, data, adapters, models, styles) -> None:
    check_end_to_end(report, name, data, models)
    check_sample(report, name, data, adapters, models, styles)


def check_augment(report: Comparison, name: str, data: Recording) -> None:
    size = int(data["size"])
    for draw in sorted({key.partition("/")[0] for key in data if "/" in key}):
        ratio = str(data[f"{draw}/ratio"])
        crop = tuple(data[f"{draw}/crop_top_left_height_width"].tolist())
        drawn = pair_data.Draw(_RATIOS.get(ratio, ratio), crop, bool(data[f"{draw}/flip"]))
        for which in ("content", "style"):
            key = f"{draw}/{which}"
            if key in data:
                report.compare(
                    f"{name} {key}",
                    lambda which=which, drawn=drawn: pair_data.augment(data[f"{which}_image"], drawn, size).transpose(
                        2, 0, 1
                    ),
                    data[key],
                    PIXELS,
                )
        shape = data["content_image"].shape
        resized = pair_data.resized_shape(shape, drawn.ratio, size)
        whole = pair_data.largest_crop(resized, shape[1] / shape[0])
        if drawn.ratio == "as it is" and whole[2:] == crop[2:]:
            report.compare(f"{name} {draw}, the centred crop", lambda whole=whole: np.array(whole), crop, EXACT)
