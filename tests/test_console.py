"""lorweb-jax: its subcommands are the modules' own commands, and it answers at once."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lorweb_jax import __version__
from lorweb_jax.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
# What takes a second or more to import.
HEAVY = ["jax", "flax", "optax", "orbax", "grain", "tensorflow", "gguf", "resvg_py", "tensorboardX", "matplotlib"]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def answer(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of lorweb-jax with these words."""
    monkeypatch.setattr(sys, "argv", ["lorweb-jax", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_a_subcommand_is_its_modules_command(tmp_path):
    """The same help, and the same sentence and status for the same mistake."""
    for words in (["--help"], ["--a", "no.png"]):
        one, other = run("-m", "lorweb_jax", "edit", *words), run("-m", "lorweb_jax.edit", *words)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert one.returncode == 2 and one.stderr.startswith("error: ") and one.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("edti", "no command 'edti'; the nearest is edit,"),
        ("base_report", "no command 'base_report'; the nearest is base-report,"),
        ("x", f"no command 'x'; there are {', '.join(COMMANDS)},"),
        ("", "no command ''; there are"),
    ],
)
def test_unknown_command(monkeypatch, capsys, word, sentence):
    status, out, err = answer(monkeypatch, capsys, word)
    assert status == 2 and not out and err.count("\n") == 1 and sentence in err


def test_no_command(monkeypatch, capsys):
    status, out, err = answer(monkeypatch, capsys)
    assert status == 2 and not out and "no command was given" in err


def test_help_names_every_command(monkeypatch, capsys):
    status, out, err = answer(monkeypatch, capsys, "--help")
    assert status == 0 and not err
    for name, module in COMMANDS.items():
        [line] = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert line.split(maxsplit=1)[1] == (ROOT / f"lorweb_jax/{module.replace('.', '/')}.py").read_text().split(
            "\n"
        )[0].strip('"')


def test_version_is_the_packages(monkeypatch, capsys):
    assert answer(monkeypatch, capsys, "--version") == (0, f"lorweb-jax {__version__}\n", "")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lorweb_jax.__version__"}
    assert project["project"]["scripts"] == {"lorweb-jax": "lorweb_jax.__main__:main"}


def test_commands_import_nothing_heavy_before_they_need_it():
    """So --help and a mistake on the command line are answered at once."""
    modules = ", ".join(f"lorweb_jax.{module}" for module in ("__main__", *COMMANDS.values()))
    told = run("-c", f"import sys, {modules}; print(*sorted(sys.modules.keys() & set({HEAVY})))")
    assert (told.stdout, told.stderr) == ("\n", "")
