"""scheduler.npz: noise levels for sampling and training, Euler steps, noising."""

import re
from functools import partial

import numpy as np

from lorweb_jax.flow.loss import add_noise
from lorweb_jax.flow.sampling import euler
from lorweb_jax.flow.schedule import TRAIN_STEPS, Schedule, bell_weights, train_timesteps
from parity.folder import Recording
from parity.report import COEFFICIENT, OUTPUT, Comparison

_LEVELS = re.compile(r"n(\d+)_L(\d+)/(mu|timesteps|sigmas)")
_TABLES = {
    "init_timesteps": train_timesteps,
    "timesteps_linear": train_timesteps,
    "timesteps_weighted": train_timesteps,
    "init_sigmas": lambda: train_timesteps() / TRAIN_STEPS,
    # Published "linear" timesteps are weighted by the bell, too.
    "weights_weighted_v2False": bell_weights,
    "weights_linear_v2False": bell_weights,
}


def check_scheduler(report: Comparison, name: str, data: Recording, schedule: Schedule) -> None:
    step_levels = None
    for key, theirs in data.items():
        line = f"{name} {key}"
        if match := _LEVELS.fullmatch(key):
            steps, tokens = int(match[1]), int(match[2])
            ours = {
                "mu": partial(schedule.shift, tokens),
                "sigmas": partial(schedule.sigmas, steps, tokens),
                "timesteps": lambda n=steps, t=tokens: schedule.sigmas(n, t)[:-1] * np.float32(TRAIN_STEPS),
            }
            report.compare(line, ours[match[3]], theirs, COEFFICIENT)
        elif key.startswith("train/") and (table := key.removeprefix("train/")) in _TABLES:
            report.compare(line, _TABLES[table], theirs, COEFFICIENT)
        elif match := re.fullmatch(r"train/add_noise_(\d+)", key):
            _check_add_noise(report, line, int(match[1]), data)
        elif match := re.fullmatch(r"step/x(\d+)", key):
            step_levels = _step_levels(data, schedule) if step_levels is None else step_levels
            _check_step(report, line, int(match[1]), data, step_levels)
        elif key in ("train/weights_weighted_v2True", "train/default_weighing_scheme_table"):
            report.deviates(line, "a loss weighting that the recipe doesn't use and this project doesn't offer")


def _check_add_noise(report: Comparison, line: str, index: int, data: Recording) -> None:
    given = [data.get(f"train/add_noise_{part}") for part in ("x0", "noise", "t")]
    if any(part is None for part in given):
        return
    x0, noise, t = (part[index : index + 1] for part in given)
    theirs = data[f"train/add_noise_{index}"]
    report.compare(
        line,
        lambda: np.asarray(add_noise(x0.reshape(1, 1, -1), noise.reshape(1, 1, -1), t / TRAIN_STEPS)).reshape(
            theirs.shape
        ),
        theirs,
        OUTPUT,
    )


def _step_levels(data: Recording, schedule: Schedule) -> np.ndarray:
    """Noise levels of the recorded Euler steps: those that the published scheduler was last set to before them."""
    keys = list(data)
    steps = sum(key.startswith("step/v") for key in keys)
    before = keys[: min(index for index, key in enumerate(keys) if key.startswith("step/"))]
    matches = [match for key in before if (match := _LEVELS.fullmatch(key)) and int(match[1]) == steps]
    return schedule.sigmas(steps, int(matches[-1][2]) if matches else 64)


def _check_step(report: Comparison, line: str, index: int, data: Recording, sigmas: np.ndarray) -> None:
    before, velocity = (data.get(f"step/{part}{index - 1}") for part in "xv")
    if before is not None and velocity is not None:
        report.compare(
            line,
            lambda: euler(lambda z, sigma: velocity, before, sigmas[index - 1 : index + 1]),
            data[f"step/x{index}"],
            OUTPUT,
        )
