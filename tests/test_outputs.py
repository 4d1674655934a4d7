"""Where results go: found out before the work, never over an input or another result; printing ends nothing."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorweb_jax.common import errors, outputs
from lorweb_jax.common.errors import UserError, patient_output, say


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "there.png").write_bytes(b"result")
    (tmp_path / "input.png").write_bytes(b"input")
    os.link(tmp_path / "input.png", tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to("input.png")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "basis.safetensors").write_bytes(b"basis")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def listed(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.mark.parametrize(
    "names, overwrite, said",
    [
        (["there.png"], False, "exists already"),
        (["input.png"], True, "one of the inputs"),
        (["hard.png"], True, "one of the inputs"),
        (["soft.png"], True, "one of the inputs"),
        (["weights/../input.png"], True, "one of the inputs"),
        (["weights/basis.safetensors"], True, "one of the inputs"),
        (["weights"], True, "is a folder"),
        (["pipe"], True, "device or a pipe"),
        (["/dev/null"], True, "device or a pipe"),
        (["file/a.png"], False, "file is a file and no folder"),
        (["file/b/a.png"], False, "file is a file and no folder"),
        (["n" * 256 + ".png"], False, "too long"),
        (["new/" + "n" * 256], False, "too long"),
        (["a\0b.png"], False, "could not be written"),
        (["a.png", "A.PNG"], False, "differ in case only"),
        (["new/\u00e9.png", "new/e\u0301.png"], False, "two results"),
        (["a.png", "./a.png"], False, "two results"),
    ],
)
def test_refused_before_the_work(folder, names, overwrite, said):
    before = listed(folder)
    with pytest.raises(UserError, match=said) as caught:
        outputs.require_writable(
            [folder / name for name in names], [folder / "input.png", folder / "weights"], overwrite=overwrite
        )
    assert "\n" not in str(caught.value) and listed(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_right(folder):
    (folder / "weights").chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        outputs.require_writable([folder / "weights" / "a.png"])


def test_full_or_read_only_disk(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            outputs.require_writable([folder / "new" / "a.png"])
    with pytest.raises(UserError, match="GB are needed"):
        outputs.require_writable([folder / "new" / "a.png"], nbytes=1 << 60)
    assert not (folder / "new").exists()
    read_only = next((Path(place) for place in ("/sys", "/proc") if Path(place).is_dir()), None)
    if read_only:
        with pytest.raises(UserError, match="could not be written"):
            outputs.require_writable([read_only / "a.png"])


def test_good_ones_leave_nothing(folder):
    before = listed(folder)
    outputs.require_writable([folder / "new" / "deeper" / "v1.5" / "a.png", folder / "b.png"], [folder / "input.png"])
    outputs.require_writable([folder / "there.png"], [folder / "input.png"], overwrite=True)
    outputs.require_new_folder(folder / "new")
    assert listed(folder) == before
    for name in ("weights", "file"):
        with pytest.raises(UserError, match="not an empty folder"):
            outputs.require_new_folder(folder / name)


def test_a_name_that_was_taken_meanwhile(folder):
    assert outputs.write_file(folder / "there.png", b"new", overwrite=False) == folder / "there-1.png"
    assert outputs.write_file(folder / "there.png", b"newer", overwrite=False) == folder / "there-2.png"
    assert (folder / "there.png").read_bytes() == b"result" and (folder / "there-1.png").read_bytes() == b"new"
    assert outputs.write_file(folder / "there.png", b"new") == folder / "there.png"
    assert (folder / "there.png").read_bytes() == b"new"


def test_a_link_is_kept_and_its_file_replaced(folder):
    (folder / "latest.png").symlink_to("there.png")
    outputs.write_file(folder / "latest.png", b"new")
    assert (folder / "latest.png").is_symlink() and (folder / "there.png").read_bytes() == b"new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_a_file_that_is_not_there_yet(folder, overwrite):
    """The file that it names is made; the link stays one."""
    (folder / "latest.png").symlink_to("runs/7.png")
    outputs.require_writable([folder / "latest.png"], overwrite=overwrite)
    assert outputs.write_file(folder / "latest.png", b"new", overwrite) == folder / "latest.png"
    assert (folder / "latest.png").is_symlink() and (folder / "runs/7.png").read_bytes() == b"new"


def test_nothing_half_written(folder, monkeypatch):
    before = listed(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for overwrite in (True, False):
        with pytest.raises(UserError, match="No space left"):
            outputs.write_file(folder / "c.png", b"new", overwrite)
    assert listed(folder) == before


def test_text_of_any_kind(folder):
    outputs.write_text(folder / "a.json", '"\u00e9 \udce9"')
    assert (folder / "a.json").read_bytes() == b'"\xc3\xa9 \\udce9"'


def test_a_folder_whole_or_not_at_all(folder):
    with pytest.raises(ZeroDivisionError):
        with outputs.replacing_folder(folder / "weights") as new:
            (new / "b").write_bytes(b"")
            raise ZeroDivisionError
    assert (folder / "weights" / "basis.safetensors").read_bytes() == b"basis"
    with outputs.replacing_folder(folder / "weights") as new:
        (new / "b").write_bytes(b"")
    assert listed(folder / "weights") == ["b"] and not list(folder.glob("weights.*"))


class Gone(io.StringIO):
    """A terminal that closed."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def test_printing_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", None)
    with patient_output():
        print("one")
        print("two", file=sys.stderr)
        say("three")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    say("\u0444 \udce9")  # outside commands too
    with patient_output():
        print("\u0444\u043e\u0442\u043e \udce9")
    assert ascii_only.buffer.getvalue() == b"\\u0444 \\udce9\n\\u0444\\u043e\\u0442\\u043e \\udce9\n"


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_whose_reader_leaves(tmp_path, status):
    """The work goes on to its end, with its own status and without a word on stderr."""
    script = (
        "import sys; from lorweb_jax.common.errors import run_command\n"
        "def main():\n"
        "    for number in range(20000): print(number, '\u0444')\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close(); return {status}\n"
        "run_command(main)"
    )
    found = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -1; exit ${PIPESTATUS[0]}', sys.executable, script],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (tmp_path / "done").exists() and found.returncode == status
    assert found.stdout == b"0 \\u0444\n" and found.stderr == b""


ROOT = Path(__file__).parents[1]
KONTEXT = ["--config=configs/basis.py:kontext", "--topology=gpu:h100x1"]


@pytest.mark.parametrize(
    "command, written",
    [
        (["-m", "lorweb_jax.plan", *KONTEXT, "--json={}/out.json"], "out.json"),
        (["-m", "lorweb_jax.plan", *KONTEXT, "--json={}/new/a.json", "--hlo={}/new/A.json"], None),
        (["tools/benchmark.py", "--no-torch", "--json={}/out.json"], "out.json"),
        (["tools/build_base.py", "--runs={}/out", "--out={}/out"], "out/model_index.json"),
        (["tools/build_base.py", "--runs={}/out", "--out={}/out", "--overwrite"], "out/mine.txt"),
        (["-m", "lorweb_jax.evaluate", "{}", "--pipeline=p", "--data=d", "--out={}/out"], "out/results.json"),
        (["-m", "lorweb_jax.evaluate", "{}", "--pipeline=p", "--data=d", "--out={}/out"], "out/report.html"),
        (["-m", "lorweb_jax.evaluate", "{}", "--pipeline=p", "--data=d", "--out={}/out"], "out"),
        (["-m", "lorweb_jax.export", "published", "run", "{}/b.safetensors"], "b.safetensors"),
        (["-m", "lorweb_jax.export", "published", "{}", "{}/b.safetensors", "--overwrite"], "b.safetensors"),
        (["-m", "lorweb_jax.export", "checkpoint", "run", "{}/out"], "out/x"),
        (
            ["-m", "lorweb_jax.export", "lora", "{}/b.safetensors", "{}/b.safetensors", "--pipeline=p", "--overwrite"],
            "b.safetensors",
        ),
        (["-m", "lorweb_jax.export", "lora", "b", "{}/b.safetensors", "--pipeline=p"], "b.safetensors"),
    ],
)
def test_commands_refuse_to_replace_files_before_they_load(tmp_path, command, written):
    """Each in one line and a second or two, for nothing is loaded; what was there stays."""
    if written:
        (tmp_path / written).parent.mkdir(exist_ok=True)
        (tmp_path / written).write_text("of the user")
    found = subprocess.run(
        [sys.executable, *(word.format(*[tmp_path] * 2) for word in command)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode in (1, 2) and found.stderr.count("\n") == 1, found.stderr
    assert any(
        words in found.stderr for words in ("exists already", "one of the inputs", "differ in case", "is a file")
    )
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["of the user"] * bool(written)


def test_errors_of_a_command_are_one_line(capsys):
    def fails():
        raise UserError("no \udce9")

    with pytest.raises(SystemExit) as caught:
        errors.run_command(fails)
    assert caught.value.code == 1 and capsys.readouterr().err.count("\n") == 1
