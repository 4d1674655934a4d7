"""The plan of the package: which of its folders may import which."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import lorweb_jax

PACKAGE = Path(lorweb_jax.__file__).parent
# From the bottom up: a module imports its own folder and those before it. Commands and the public interface, which
# stand loose at the top of the package, come last.
ORDER = (
    "common",
    "settings",
    "nn",
    "flow",
    "images",
    "processes",
    "files",
    "models",
    "adapters",
    "runs",
    "data",
    "pipeline",
    "precomputed",
    "evaluation",
    "training",
    "small_base",
    "jobs",
    "planning",
    "studio",
)
COMMANDS = {
    "__init__",
    "__main__",
    "main",
    "edit",
    "stylize",
    "export",
    "evaluate",
    "plan",
    "precompute",
    "base_report",
    "demo",
}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, also as text that names a function to import."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("lorweb_jax."):
            if node.value.count(":") == 1 and " " not in node.value:
                names.add(node.value)
    return names


def folder(module: str) -> str | None:
    """The folder of the package that a module is in; None outside the package, "" for what stands loose in it."""
    first, *rest = module.split(".")
    if first != "lorweb_jax":
        return None
    return rest[0] if rest and (PACKAGE / rest[0]).is_dir() else ""


def test_no_arrow_runs_back_up():
    ranks = {name: rank for rank, name in enumerate((*ORDER, ""))}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ORDER)
    wrong, arrows = [], set()
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).parts
        here = parts[0] if len(parts) > 1 else ""
        for module in imported(file):
            there = folder(module)
            if there is None or (here == "" and there == ""):
                continue
            arrows.add((here, there))
            if ranks[there] > ranks[here]:
                wrong.append(f"{'/'.join(parts)} imports {module}")
    assert not wrong, "\n".join(wrong)
    assert len(arrows) > len(ORDER)


def test_commands_stand_loose_and_nothing_else():
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS


def test_every_folder_is_installed():
    """setuptools leaves out folders without __init__.py, and files that are neither Python nor named as data."""
    data = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {path for name, globs in data.items() for each in globs for path in PACKAGE.parent.joinpath(
        *name.split(".")).glob(each)}  # fmt: skip
    for file in (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        assert file in named or file.suffix == ".py" and (file.parent / "__init__.py").exists(), file


def at_import(file: Path) -> set[str]:
    """Modules that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_model_needs_jax_flax_optax_numpy_alone():
    """FLUX.1, a basis and the sampler, all that they import in turn: an accelerator's machine may have no more."""
    waiting = {PACKAGE / f"{name}.py" for name in ("models/flux1/model", "adapters/basis", "adapters/fold")}
    waiting |= set((PACKAGE / "nn").glob("*.py")) | set((PACKAGE / "flow").glob("*.py"))
    done, foreign = set(), set()
    while waiting:
        file = waiting.pop()
        done.add(file)
        for module in at_import(file):
            first, *rest = module.split(".")
            if first != "lorweb_jax":
                foreign.add(first)
            elif (path := PACKAGE.joinpath(*rest).with_suffix(".py")).exists() and path not in done:
                waiting.add(path)
    # ml_dtypes comes with jax.
    assert foreign - set(sys.stdlib_module_names) <= {"jax", "flax", "optax", "numpy", "safetensors", "ml_dtypes"}


def test_nothing_imports_torch():
    found = {
        f"{file.relative_to(PACKAGE)}: {module}"
        for file in PACKAGE.rglob("*.py")
        for module in imported(file)
        if module.split(".")[0] in ("torch", "diffusers", "transformers", "peft")
    }
    assert not found


def test_training_starts_without_torch():
    """Which tensorboardX would import, and which is installed here: seconds of every start."""
    code = "import sys, lorweb_jax.training.loop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
