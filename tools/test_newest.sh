#!/usr/bin/env bash
# A short set of tests (golden grids, ids, coefficients and velocity; plan from shapes) on the newest Python of this machine, 3.13 or 3.12,
# and the newest packages that pyproject.toml allows. Says so where there is none, or where they can't be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
venv=.venv-newest

for version in 3.13 3.12; do
  found=$(command -v "python$version" || true)
  if command -v pyenv >/dev/null; then
    newest=$(pyenv latest "$version" 2>/dev/null || true)
    if [ -n "$newest" ]; then found=$(pyenv prefix "$newest" 2>/dev/null)/bin/python; fi
  fi
  if [ -n "$found" ] && "$found" -c 'import ensurepip' 2>/dev/null; then break; fi
  found=
done
if [ -z "${found:-}" ]; then echo "newest packages: skipped, there is no Python 3.13 or 3.12 here"; exit 0; fi

if [ ! -e "$venv/installed" ] || [ pyproject.toml -nt "$venv/installed" ]; then
  if ! { rm -rf "$venv" && "$found" -m venv "$venv" &&
         "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile . pytest; } >/dev/null 2>&1; then
    echo "newest packages: skipped, they can't be installed with $found"; exit 0
  fi
  touch "$venv/installed"
fi
"$venv/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(jax|flax|numpy|pillow|tokenizers) ' || true
"$venv/bin/python" -m pytest -q -o addopts=-ra tests/test_tokenizers.py tests/test_grid.py \
  tests/test_router.py tests/test_plan.py tests/test_flux.py::test_equals_golden \
  -k "not test_command and not test_suggestions_fit and not in_the_transformer"
echo "newest packages: $((SECONDS - started)) s on $("$venv/bin/python" --version)"
