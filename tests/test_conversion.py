"""Conversion of weight files as a stream: kills, full disks, changed sources; what was written is checked again."""

import json
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.files import conversion
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import write
from lorweb_jax.pipeline import pretrained

SOURCE = golden_dir() / "tiny_pipeline" / "transformer"
SHARD = 1_000_000  # bytes: the tiny transformer makes several files


def convert(out: Path, layout: str = "diffusers", source: Path = SOURCE, **options) -> Path:
    return pretrained.convert(pretrained.recognise(source), layout, out, max_shard_bytes=SHARD, **options)[0]


def content(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".checksums.json")]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What an undisturbed conversion writes, by layout."""
    out = tmp_path_factory.mktemp("whole")
    return {layout: content(convert(out, layout)) for layout in pretrained.LAYOUTS}


class Killed(BaseException):
    pass


def kill_at(bytes_done: int):
    """A progress that ends the conversion there, and remembers with how many bytes it began."""

    def progress(done: int, total: int, size: int) -> None:
        progress.first = done - size if progress.first is None else progress.first
        if done >= bytes_done:
            raise Killed

    progress.first = None
    return progress


def loads(folder: Path) -> list[Path]:
    """What in a folder our reader or the safetensors package takes for a whole checkpoint of this model."""
    found = []
    for path in [folder, *folder.rglob("*")]:
        try:
            pretrained.open_model(path, "transformer")
        except UserError:
            continue
        found.append(path)
    return found


@pytest.mark.parametrize("layout", pretrained.LAYOUTS)
def test_goes_on_after_kills(layout, whole, tmp_path):
    """Killed again and again, it begins each time with all tensors that were whole, and ends with the same bytes."""
    kept = 0
    for point in (100_000, 1_100_000, 2_500_000, 4_700_000):
        progress = kill_at(point)
        with pytest.raises(Killed):
            convert(tmp_path, layout, progress=progress)
        lines = [json.loads(line) for line in next(tmp_path.rglob("journal.jsonl")).read_text().splitlines()]
        assert kept <= progress.first and not loads(tmp_path)
        assert sum("tensor" in line for line in lines) > 0
        kept = point - 300_000  # the largest tensor has 229,376 bytes
    assert content(convert(tmp_path, layout)) == whole[layout]
    assert not list(tmp_path.rglob("*partial*")) and not list(tmp_path.rglob("journal*"))


def test_goes_on_after_sigkill(whole, tmp_path):
    script = (
        "import os; from lorweb_jax.pipeline import pretrained; pretrained.convert(pretrained.recognise("
        f"{str(SOURCE)!r}), 'diffusers', {str(tmp_path)!r}, max_shard_bytes={SHARD}, progress=lambda done, *_:"
        " done > 3_000_000 and os.kill(os.getpid(), 9))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    files = {file.name: file.stat() for file in (tmp_path / "transformer.partial").glob("*.safetensors")}
    assert len(files) == 3
    assert content(convert(tmp_path)) == whole["diffusers"]
    # Finished shards are the files that the killed process wrote, untouched.
    assert all(
        (tmp_path / "transformer" / name).stat()[:2] == found[:2]
        and (tmp_path / "transformer" / name).stat().st_mtime_ns == found.st_mtime_ns
        for name, found in files.items()
    )


def test_what_had_not_reached_the_disk_is_written_again(whole, tmp_path):
    """As after a power failure: the journal is ahead of the data, or ends in half a line."""
    with pytest.raises(Killed):
        convert(tmp_path, "black_forest", progress=kill_at(3_000_000))
    partial = tmp_path / "flux1-kontext.safetensors.partial"
    file = partial / "flux1-kontext.safetensors.partial"
    with open(file, "r+b") as stream:
        stream.seek(-600_000, 2)
        stream.write(bytes(1000))
    with open(partial / "journal.jsonl", "ab") as stream:
        stream.write(b'{"file": "flux1-kon')
    progress = kill_at(1 << 40)
    assert content(convert(tmp_path, "black_forest", progress=progress)) == whole["black_forest"]
    assert 1_000_000 < progress.first < 2_700_000


def test_only_the_same_command_goes_on(whole, tmp_path):
    source = tmp_path / "source"
    write(source / "model.safetensors", safetensors.numpy.load_file(SOURCE / "diffusion_pytorch_model.safetensors"))
    (source / "config.json").write_text((SOURCE / "config.json").read_text())
    with pytest.raises(Killed):
        convert(tmp_path, source=source, progress=kill_at(1_500_000))
    with pytest.raises(UserError, match="another dtype"):
        convert(tmp_path, source=source, dtype=np.float16)
    journal = conversion.Journal(tmp_path / "transformer.partial" / "journal.jsonl", {})
    with pytest.raises(UserError, match="another process is writing"):
        convert(tmp_path, source=source)
    journal.close()
    (source / "model.safetensors").touch()
    with pytest.raises(UserError, match="another source"):
        convert(tmp_path, source=source)


@contextmanager
def file_limit(nbytes: int):
    """The kernel refuses to write beyond this size, at any byte, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("layout", pretrained.LAYOUTS)
def test_full_disk_leaves_nothing_that_loads_and_goes_on(layout, whole, tmp_path):
    """From within the journal to within the last file."""
    for limit in (10, 200, 5_000, 300_001, 900_000, 4_000_000):
        with file_limit(limit):
            try:
                convert(tmp_path, layout)
            except UserError as error:
                assert "the disk is full" in str(error) and "same command" in str(error)
            else:
                break  # small shards fit below the last limit
        assert not loads(tmp_path)
    if not (tmp_path / "transformer").exists():
        convert(tmp_path, layout)
    assert content(next(iter(tmp_path.glob("*.safetensors")), tmp_path / "transformer")) == whole[layout]


def test_no_space_left_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4_000_000}))
    with pytest.raises(UserError, match="has 0.00 GB free, but .* needs 0.01 GB"):
        convert(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_written_files_are_verified(tmp_path):
    for layout in pretrained.LAYOUTS:
        convert(tmp_path, layout)
    found = pretrained.verify(tmp_path)
    assert sorted(len(checkpoint) for checkpoint in found) == [92, 126]
    recorded = json.loads((tmp_path / "transformer" / "checksums.json").read_text())
    assert recorded["count"] == 126 and recorded["algorithm"] == "sha256"
    file = sorted((tmp_path / "transformer").glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    last = list(Checkpoint(file))[-1]
    with pytest.raises(UserError, match=f"1 of 126 tensors .*{last}"):
        pretrained.verify(tmp_path / "transformer")
    with pytest.raises(UserError, match="no checksums.json"):
        pretrained.verify(SOURCE)


def test_beyond_float16_is_refused(tmp_path):
    held = safetensors.numpy.load_file(SOURCE / "diffusion_pytorch_model.safetensors")
    name = "single_transformer_blocks.0.proj_mlp.weight"
    held[name] = held[name].astype(ml_dtypes.bfloat16)
    held[name][3, 4] = 1e5
    write(tmp_path / "model.safetensors", held)
    (tmp_path / "config.json").write_text((SOURCE / "config.json").read_text())
    with pytest.raises(UserError, match="99840.0 is beyond the range of float16"):
        convert(tmp_path / "out", source=tmp_path, dtype=np.float16)
    assert not loads(tmp_path / "out")


def test_names_with_comfyui_prefix(whole, tmp_path):
    single = convert(tmp_path, "black_forest")
    held = safetensors.numpy.load_file(single)
    (tmp_path / "prefixed").mkdir()
    prefixed = tmp_path / "prefixed" / "flux.safetensors"
    write(prefixed, {f"model.diffusion_model.{name}": array for name, array in held.items()})
    source = pretrained.recognise(prefixed, SOURCE / "config.json")
    assert (source.kind, source.layout) == ("transformer", "black_forest")
    target, _ = pretrained.convert(source, "diffusers", tmp_path, max_shard_bytes=SHARD)
    assert content(target) == whole["diffusers"]
