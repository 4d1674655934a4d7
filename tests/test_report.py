"""What a run tells: text log, TensorBoard events, pictures."""

import io
import json
import struct
import sys
import time

import line_job
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from lorweb_jax.common.errors import UserError
from lorweb_jax.images import pictures, plots
from lorweb_jax.settings.config import check
from lorweb_jax.training.loop import train
from lorweb_jax.training.report import Report, report_only, tracked
from lorweb_jax.training.writers import require_trackers


def events(workdir):
    """The records of TensorBoard's file: length, its checksum, bytes, their checksum."""
    data = next(workdir.glob("events*")).read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_means_reach_the_log_and_tensorboard(tmp_path):
    config = line_job.get_config()
    report = Report(tmp_path, config, first_step=0, log_state=[])
    for step, loss in enumerate([1.0, 2.0, 6.0]):
        report.add(step, {"error": np.float32(2 * loss), "loss": np.float32(loss)})
    report.write(3, 0.05)
    report.log_images(3, {"rows": np.full((4, 6, 3), 255, np.uint8), "members": 2.5})
    report.close()
    assert (tmp_path / "log.txt").read_text() == "step 3  loss 3  error 6  learning_rate 0.05\n"
    values = {value.tag: value for event in events(tmp_path) if event.step == 3 for value in event.summary.value}
    assert values["loss"].simple_value == 3.0 and values["error"].simple_value == 6.0
    assert (values["rows"].image.height, values["rows"].image.width) == (4, 6)
    assert values["members"].simple_value == 2.5 and "members" not in (tmp_path / "log.txt").read_text()
    assert "tensorflow" not in sys.modules


def test_lines_after_the_checkpoint_are_taken_out(tmp_path):
    (tmp_path / "log.txt").write_text("step 2  loss 1\nstep 4  loss 1\nstep 6  lo")
    Report(tmp_path, line_job.get_config(), first_step=3, log_state=[]).close()
    assert (tmp_path / "log.txt").read_text() == "step 2  loss 1\n"


@pytest.mark.parametrize(
    "odd",
    [
        b"\n",
        b"\n\n",
        b"\xff\xfe\n",
        b"step\n",
        b"step x  loss 1\n",
        b"\0\0\0\n",
        b"a note\n",
        b"step 1\r  loss\n",
        b"step " + b"9" * 5000 + b"  loss 1\n",
    ],
)
def test_a_log_that_is_not_as_it_was_written_goes_on(tmp_path, odd):
    (tmp_path / "log.txt").write_bytes(b"step 2  loss 1\n" + odd + b"step 3  loss 1\nstep 4  loss 1\nstep 6  lo")
    Report(tmp_path, line_job.get_config(), first_step=3, log_state=[]).close()
    assert (tmp_path / "log.txt").read_bytes() == b"step 2  loss 1\n" + odd + b"step 3  loss 1\n"


def test_a_log_that_can_not_be_read(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match="log.txt is a folder, a regular file was expected"):
        Report(tmp_path, line_job.get_config(), first_step=3, log_state=[])


def test_what_is_only_shown_never_ends_a_run(capsys):
    for error, told in (
        (UserError("no room"), "no room"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("out of memory\n" + "x" * 1000), "RuntimeError: out of memory xx"),
    ):
        with report_only("the table"):
            raise error
        line = capsys.readouterr().err
        assert line.startswith(f"the table could not be made, the run goes on without: {told}")
        assert line.count("\n") == 1 and len(line) < 420
    with pytest.raises(KeyboardInterrupt), report_only("the table"):
        raise KeyboardInterrupt


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_of_a_run(monkeypatch, workdir, stream: io.StringIO) -> str:
    """What six steps of 2 examples write: the first takes a minute, the others a second, pictures after step 4 more."""
    clock = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: clock)
    monkeypatch.setattr(sys, "stdout", stream)
    config = line_job.get_config()
    config.train.steps, config.train.batch = 6, 2
    report = Report(workdir, config, first_step=0, log_state=[])
    for step in range(6):
        clock += 1.0 if step else 60.0
        report.add(step, {"loss": np.float32(0.5)})
        if step % 2:
            report.write(step + 1, 0.1)
        if step == 3:
            clock += 100.0
            report.restart_clock()
    report.close()
    return stream.getvalue()


def test_progress_is_lines_in_a_file(monkeypatch, tmp_path):
    """Of the speed without compiling and pictures: the last line's would be 0.14 examples/s with them."""
    assert progress_of_a_run(monkeypatch, tmp_path, io.StringIO()) == (
        "step 2/6, loss 0.50000,  2.00 examples/s, 00:04 left\n"
        "step 4/6, loss 0.50000,  2.00 examples/s, 00:02 left\n"
        "step 6/6, loss 0.50000,  2.00 examples/s, 00:00 left\n"
    )


def test_progress_is_a_bar_on_a_terminal(monkeypatch, tmp_path):
    *_, last = progress_of_a_run(monkeypatch, tmp_path, Terminal()).strip().split("\r")
    assert last.startswith("step 6/6: 100%|") and "2.00 examples/s, loss 0.50000]" in last and "\n" not in last


def test_a_sheet_shows_small_images_enlarged_with_hard_edges():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = (255, 0, 0)
    shown = pictures.sheet([("put a frame around it", [image, image])], columns=["a", "result"])
    red = (shown == (255, 0, 0)).all(-1)
    assert red.sum() == 2 * 96 * 48
    assert shown.dtype == np.uint8 and (shown[:14] == 0).any()  # the titles


@pytest.mark.parametrize("text", ["a\nb", "\udce9", "\0\x1b[0m", "\u56fe", "x" * 100_000, ""])
def test_pictures_take_any_text_in_no_time(text):
    image = np.zeros((8, 8, 3), np.uint8)
    shown = [pictures.sheet([(text, [image])], columns=[text]), plots.heat_map(np.eye(2), [text] * 2, [text] * 2, text)]
    assert all(max(picture.shape) < 2000 for picture in shown)


def test_a_heat_map_is_darkest_where_the_value_is_highest():
    values = np.zeros((3, 5))
    values[2, 4] = 1
    shown = plots.heat_map(values, rows=["frame", "shift", "pixelate"], columns=[str(i) for i in range(5)])
    rows, columns = np.nonzero((shown == (8, 48, 107)).all(-1))
    assert len(rows) > 100 and rows.min() > shown.shape[0] / 2 and columns.min() > shown.shape[1] / 2


def test_a_plane_has_a_colour_for_each_label():
    """Two tasks far apart: the dots of one are red, at the left, the other's cyan, at the right."""
    place = np.array([[0.0, 0], [0.1, 1], [5, 0], [5.1, 1]])
    shown = plots.plane(place, ["a", "a", "b\n", "b\n"], "title").astype(int)
    red = np.nonzero((shown[..., 0] > 200) & (shown[..., 1:] < 100).all(-1))[1]
    cyan = np.nonzero((shown[..., 0] < 100) & (shown[..., 1:] > 200).all(-1))[1]
    assert len(red) > 20 and len(cyan) > 20 and red.max() < cyan.min()


def test_any_text_can_be_drawn():
    """Captions and names of tasks as data brings them, also megabytes long, on one line each."""
    image = np.zeros((32, 32, 3), np.uint8)
    plain = pictures.sheet([("a caption", [image])], ["a"])
    for text in ("", "a\nb\r\n\tc", "\0\x1b[2J", "\ud800 \udce9", "x" * 10**6, "🙂′é" * 10**5, "\u202eabc"):
        assert pictures.sheet([(text, [image])], [text]).shape == plain.shape
        assert plots.heat_map(np.zeros((1, 2)), [text], [text, "b"]).shape[0] < 100


def train_twice(workdir, tracker):
    """Four steps, and two more of the same run; returns {step: loss} of its log."""
    config = line_job.get_config()
    config.trackers, config.compile_cache = (tracker,), False
    for config.train.steps in (4, 6):
        assert train(config, workdir, line_job.make)
    lines = [line.split() for line in (workdir / "log.txt").read_text().splitlines()]
    return {int(line[1]): float(line[3]) for line in lines}


def wandb_records(file):
    """(ids and names, config, what was logged by step, exit codes) of a .wandb file: after 7 bytes, blocks as of
    LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    runs, settings, logged, codes, record = set(), {}, {}, [], b""
    data, place = file.read_bytes(), 7
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header at a block's end
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            read, record = wandb_internal_pb2.Record.FromString(record), b""
            runs |= {(read.run.run_id, read.run.project, read.run.display_name)} if read.HasField("run") else set()
            settings |= {item.key: json.loads(item.value_json) for item in read.run.config.update}
            codes += [read.exit.exit_code] if read.HasField("exit") else []
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in read.history.item}
            logged.setdefault(items.get("_step"), {}).update(items)
    return runs, settings, logged, codes


def finished_records(file):
    """The same once the run's end is in the file, which a process of wandb's own writes."""
    for _ in range(600):
        if (records := wandb_records(file))[3]:
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def test_metrics_and_pictures_reach_weights_and_biases(tmp_path, monkeypatch, quick_compiles):
    """Offline; a run that goes on is the same tracked run, and an error makes it a failed one."""
    pytest.importorskip("wandb", reason="wandb, the extra [wandb], is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = tmp_path / "some run"
    losses = train_twice(workdir, "wandb")
    config = line_job.get_config()
    config.trackers = ("wandb",)
    with pytest.raises(ZeroDivisionError), tracked(config, workdir):
        raise ZeroDivisionError
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    first, second, third = map(finished_records, files)
    [(own, *names)] = first[0]
    assert names == ["lorweb_jax", "some run"] and len(own) == 8 and first[0] == second[0] == third[0]
    assert first[1]["train"]["batch"] == 8 and first[1]["trackers"] == ["wandb"]
    logged = {step: values for of_run in (first, second) for step, values in of_run[2].items() if step is not None}
    assert list(logged) == list(losses) == [1, 2, 3, 4, 5, 6]
    for step, loss in losses.items():
        assert logged[step]["loss"] == pytest.approx(loss, rel=1e-6) and "learning_rate" in logged[step]
    for last in (4, 6):
        assert (logged[last]["slope.width"], logged[last]["slope.height"]) == (8, 8)
    assert [of_run[3] for of_run in (first, second, third)] == [[0], [0], [1]]


def test_metrics_and_pictures_reach_trackio(tmp_path, monkeypatch, quick_compiles):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is looked at when trackio is imported
    pytest.importorskip("trackio", reason="trackio, the extra [trackio], is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    losses = train_twice(tmp_path / "some run", "trackio")
    [run] = SQLiteStorage.get_run_records("lorweb_jax")
    assert run["name"].startswith("some run ")
    assert SQLiteStorage.get_run_config("lorweb_jax", run["name"])["train"]["batch"] == 8
    logged = {}
    for values in SQLiteStorage.get_logs("lorweb_jax", run["name"]):
        logged.setdefault(values["step"], {}).update(values)
    assert {step: values["loss"] for step, values in logged.items()} == pytest.approx(losses, rel=1e-6)
    for last in (4, 6):
        assert logged[last]["slope"]["_type"] == "trackio.image"


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
    config = line_job.get_config()
    config.trackers = ("wand",)
    with pytest.raises(UserError, match="config.trackers is .'wand'"):
        check(config)
    (tmp_path / "trackio").mkdir()  # no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match="trackio, which is not installed; pip install 'lorweb_jax.trackio.'") as error:
        require_trackers(["trackio"])
    assert error.value.code == 2
