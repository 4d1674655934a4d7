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
from lorweb_jax.common.locks import locked
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

    def progress(done: int, total: int) -> None:
        progress.first = done if progress.first is None else progress.first
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
    """Killed again and again, it begins each time with the files that were whole, and ends with the same bytes."""
    for point in (100_000, 1_100_000, 2_500_000, 4_700_000):
        progress = kill_at(point)
        files = sorted(tmp_path.glob("*/*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        with pytest.raises(Killed):
            convert(tmp_path, layout, progress=progress)
        assert 0 <= size - progress.first <= 8_000 * len(files)  # their headers
        assert not loads(tmp_path)
    assert bool(files) == (layout == "diffusers")  # the other layout is a single file
    assert content(convert(tmp_path, layout)) == whole[layout]
    assert not list(tmp_path.rglob("*partial*")) and not list(tmp_path.rglob(".lock"))
    assert not list(tmp_path.rglob(conversion.FINISHED))


def test_goes_on_after_sigkill(whole, tmp_path):
    script = (
        "import os; from lorweb_jax.pipeline import pretrained; pretrained.convert(pretrained.recognise("
        f"{str(SOURCE)!r}), 'diffusers', {str(tmp_path)!r}, max_shard_bytes={SHARD}, progress=lambda done, _:"
        " done > 3_000_000 and os.kill(os.getpid(), 9))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    partial = tmp_path / "transformer.partial"
    files = {file.name: file.stat() for file in partial.glob("*.safetensors")}
    assert len(files) > 1 and len(list(partial.glob("*.safetensors.*.partial"))) == 1
    assert content(convert(tmp_path)) == whole["diffusers"]
    # Finished shards are the files that the killed process wrote, untouched.
    assert all(
        (tmp_path / "transformer" / name).stat()[:2] == stat[:2]
        and (tmp_path / "transformer" / name).stat().st_mtime_ns == stat.st_mtime_ns
        for name, stat in files.items()
    )


def test_only_files_that_are_recorded_and_whole_are_kept(whole, tmp_path):
    """Of the finished files one is cut short, another isn't in finished.json: as if killed between its rename and the
    record. Both are written again."""
    with pytest.raises(Killed):
        convert(tmp_path, progress=kill_at(3_500_000))
    partial = tmp_path / "transformer.partial"
    first, second, *others = sorted(partial.glob("*.safetensors"))
    assert others
    with open(first, "r+b") as stream:
        stream.truncate(600_000)
    finished = json.loads((partial / conversion.FINISHED).read_text())
    del finished["files"][second.name]
    (partial / conversion.FINISHED).write_text(json.dumps(finished))
    size, progress = sum(file.stat().st_size for file in others), kill_at(1 << 40)
    assert content(convert(tmp_path, progress=progress)) == whole["diffusers"]
    assert size - 8_000 * len(others) < progress.first < size  # their headers


def test_a_file_of_another_task_that_was_never_recorded_is_no_part_of_the_result(whole, tmp_path):
    with pytest.raises(Killed):
        convert(tmp_path, dtype=np.float16, progress=kill_at(100_000))
    foreign = tmp_path / "transformer.partial" / "diffusion_pytorch_model-00001-of-00009.safetensors"
    foreign.write_bytes(b"of a conversion to float16")
    assert content(convert(tmp_path)) == whole["diffusers"]


def test_only_the_same_command_goes_on(tmp_path):
    source = tmp_path / "source"
    write(source / "model.safetensors", safetensors.numpy.load_file(SOURCE / "diffusion_pytorch_model.safetensors"))
    (source / "config.json").write_text((SOURCE / "config.json").read_text())
    with pytest.raises(Killed):
        convert(tmp_path, source=source, progress=kill_at(1_500_000))
    with pytest.raises(UserError, match="another dtype"):
        convert(tmp_path, source=source, dtype=np.float16)
    with locked(tmp_path / "transformer.partial" / ".lock", wait=False):
        with pytest.raises(UserError, match="another process is writing"):
            convert(tmp_path, source=source)
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
    """From within finished.json to within the last file."""
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
    tensors = safetensors.numpy.load_file(SOURCE / "diffusion_pytorch_model.safetensors")
    name = "single_transformer_blocks.0.proj_mlp.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    tensors[name][3, 4] = 1e5
    write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text((SOURCE / "config.json").read_text())
    with pytest.raises(UserError, match="99840.0 is beyond the range of float16"):
        convert(tmp_path / "out", source=tmp_path, dtype=np.float16)
    assert not loads(tmp_path / "out")


def test_names_with_comfyui_prefix(whole, tmp_path):
    single = convert(tmp_path, "black_forest")
    tensors = safetensors.numpy.load_file(single)
    (tmp_path / "prefixed").mkdir()
    prefixed = tmp_path / "prefixed" / "flux.safetensors"
    write(prefixed, {f"model.diffusion_model.{name}": array for name, array in tensors.items()})
    source = pretrained.recognise(prefixed, SOURCE / "config.json")
    assert (source.kind, source.layout) == ("transformer", "black_forest")
    target, _ = pretrained.convert(source, "diffusers", tmp_path, max_shard_bytes=SHARD)
    assert content(target) == whole["diffusers"]
