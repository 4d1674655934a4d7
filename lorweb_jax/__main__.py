"""The commands as subcommands of one: `lorweb-jax edit …` is `python -m lorweb_jax.edit …`."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from lorweb_jax import __version__
from lorweb_jax.common.errors import UserError, run_command

# Subcommand -> the module of the package that runs it, as if by python -m.
COMMANDS = {
    "edit": "edit",
    "stylize": "stylize",
    "look": "data.look",
    "store": "data.store",
    "measure": "data.measure",
    "train": "main",
    "precompute": "precompute",
    "plan": "plan",
    "export": "export",
    "evaluate": "evaluate",
    "runs": "runs.__main__",
    "base-report": "base_report",
    "demo": "demo",
}


def usage() -> str:
    lines = [f"  {name:<12} {_summary(module)}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lorweb-jax COMMAND …, or lorweb-jax COMMAND --help",
            "",
            "Visual analogy editing in JAX: show it a → a′ and b, and it makes b′.",
            "",
            *lines,
            "",
            "train, precompute and plan read a config file; the repository has them in configs/, to copy and change.",
        ]
    )


def _summary(module: str) -> str:
    """The first line of a command's docstring, without importing it."""
    source = (Path(__file__).parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def answer(words: list[str]) -> None:
    """Print what a command line without a known command asks for; UserError, with status 2, where it is a mistake."""
    first = words[0] if words else None
    if first == "--version":
        print(f"lorweb-jax {__version__}")
    elif first in ("--help", "-h"):
        print(usage())
    elif first is None:
        raise UserError(f"no command was given; there are {', '.join(COMMANDS)}, see lorweb-jax --help", 2)
    else:
        near = difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.5)
        hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"lorweb-jax has no command {first!r}; {hint}, see lorweb-jax --help", 2)


def main() -> None:
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"lorweb_jax.{COMMANDS[words[0]]}", run_name="__main__", alter_sys=True)
    else:
        run_command(lambda: answer(words))


if __name__ == "__main__":
    main()
