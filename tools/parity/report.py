"""Quantities compared one by one, a line each, and the count at the end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError


class Tolerance(NamedTuple):
    """`limit` holds for the relative error ‖ours − theirs‖₂ / ‖theirs‖₂, or for the largest absolute one."""

    limit: float
    relative: bool = True

    def __str__(self) -> str:
        if self.relative:
            return f"{self.limit:.0e}"
        return "exact" if self.limit == 0 else f"{self.limit:g} level"


OUTPUT, GRADIENT, COEFFICIENT = Tolerance(1e-5), Tolerance(1e-4), Tolerance(1e-6)
INTERNAL_COEFFICIENT = OUTPUT  # they follow hidden states
EXACT, LEVEL = Tolerance(0, relative=False), Tolerance(1, relative=False)


def errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(largest absolute error, relative error), in float64. Where theirs is all zero, relative is 0 or infinite."""
    ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
    difference = ours - theirs
    size, error = np.linalg.norm(theirs), np.linalg.norm(difference)
    largest = float(np.abs(difference).max(initial=0.0))
    return largest, float(error / size) if size else (np.inf if error else 0.0)


class Absent(Exception):
    """Something that a check needs is not there; the message says what to give."""


class Comparison:
    """Prints a line for each quantity and counts."""

    def __init__(self, write: Callable[[str], Any] = print):
        self.write = write
        self.passed = self.failed = self.skipped = self.deviations = 0

    def compare(self, name: str, ours: Callable[[], Any], theirs: Any, tolerance: Tolerance) -> None:
        """Compare what `ours()` returns with `theirs`. An error on the way is a failure of this quantity alone;
        where `ours` raises Absent, the quantity is not checked."""
        theirs = np.asarray(theirs)
        try:
            array = np.asarray(ours())
            if array.shape != theirs.shape:
                raise UserError(f"ours has the shape {list(array.shape)}, theirs {list(theirs.shape)}")
            largest, relative = errors(array, theirs)
        except Absent as absent:
            self.skip(name, str(absent))
        except UserError as error:
            self.fail(name, str(error))
        except Exception as error:  # recorded data may hold anything; the other lines matter to the user
            self.fail(name, f"could not be computed from this data ({_first_line(error)})")
        else:
            good = (relative if tolerance.relative else largest) <= tolerance.limit
            self._count(good)
            self.write(
                f"{name:<68} abs {largest:8.2e}  rel {relative:8.2e}  tol {tolerance!s:<7}  {'ok' if good else 'FAIL'}"
            )

    def fail(self, name: str, why: str) -> None:
        self._count(False)
        self.write(f"{name:<68} FAIL: {' '.join(why.split())}")

    def deviates(self, name: str, why: str) -> None:
        """Not comparable, because ours is meant to differ."""
        self.deviations += 1
        self.write(f"{name:<68} deviates on purpose: {why}")

    def skip(self, name: str, why: str) -> None:
        """Found, but something needed to check it is not there."""
        self.skipped += 1
        self.write(f"{name:<68} not checked: {why}")

    def summary(self) -> int:
        """Print the count; the exit status: 1 if anything failed or nothing was compared."""
        if self.skipped:
            self.write(f"{self.skipped} found but not checked, as said above")
        self.write(f"{self.passed} passed, {self.failed} failed")
        return int(self.failed > 0 or self.passed == 0)

    def _count(self, good: bool) -> None:
        self.passed += good
        self.failed += not good


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
