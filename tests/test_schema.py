"""JSON and YAML through the schema layer: what is wrong is told as file, field, found, expected."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, Blocks, checked, parse_json, read_json, read_yaml
from lorweb_jax.common.user_files import inside, read_bytes, read_text, regular_file

BAD = Path(__file__).parent / "files_that_lie"


@dataclasses.dataclass(frozen=True)
class Inner:
    width: Annotated[int, Between(1, 8)]


@dataclasses.dataclass(frozen=True)
class Outer:
    num_layers: Blocks
    axes: Annotated[tuple[int, ...], Between(1, 3)] = (1,)
    scale: Annotated[float, Between(0.0, 10.0)] = 1.0
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    inner: Inner | None = None
    by_name: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def test_a_good_file_becomes_its_type(tmp_path):
    text = (
        '{"num_layers": 3, "axes": [1, 2], "scale": 2, "inner": {"width": 4, "more": 1}, "unknown": [null, -1.5e3], '
        '"by_name": {"x": [1]}}'
    )
    expected = Outer(3, (1, 2), 2.0, inner=Inner(4), by_name={"x": [1]})
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows' editors begin a file
    (tmp_path / "a.yaml").write_text(text.replace("1.5e3", "1.5"))
    assert read_json(tmp_path / "a.json", Outer) == read_yaml(tmp_path / "a.yaml", Outer) == expected
    assert read_json(tmp_path / "a.json")["unknown"] == [None, -1500.0]


@pytest.mark.parametrize(
    "text, told",
    [
        ("{}", "num_layers is missing"),
        ("[]", r"the whole is \[\], expected an object"),
        ("", "is empty"),
        ('{"num_layers": true}', "num_layers is true, expected a whole number"),
        ('{"num_layers": 3.0}', "num_layers is 3.0, expected a whole number"),
        ('{"num_layers": -0}', "num_layers is -0.0, expected a whole number"),
        ('{"num_layers": "3"}', 'num_layers is "3", expected a whole number'),
        ('{"num_layers": null}', "num_layers is null, expected a whole number"),
        ('{"num_layers": 1001}', "num_layers is 1001, expected from 0 to 1,000"),
        ('{"num_layers": 1' + "0" * 39 + "}", "num_layers is 1000.*, expected from 0 to 1,000"),
        ('{"num_layers": 1' + "0" * 9999 + "}", "a whole number has 10000 digits"),
        ('{"num_layers": 1, "axes": []}', r"axes is \[\], expected a length from 1 to 3"),
        ('{"num_layers": 1, "axes": [1, "2"]}', r'axes\[1\] is "2", expected a whole number'),
        ('{"num_layers": 1, "axes": {"0": 1}}', "axes is .*, expected a list"),
        ('{"num_layers": 1, "scale": false}', "scale is false, expected a number"),
        ('{"num_layers": 1, "scale": NaN}', "NaN is no number"),
        ('{"num_layers": 1, "x": -Infinity}', "-Infinity is no"),
        ('{"num_layers": 1, "scale": 1e999}', "1e999 is beyond the range"),
        ('{"num_layers": 1, "kind": ["a"]}', r"kind is \[\"a\"\], expected 'a' or 'b'"),
        ('{"num_layers": 1, "flag": 1}', "flag is 1, expected true or false"),
        ('{"num_layers": 1, "inner": [1]}', r"inner is \[1\], expected an object"),
        ('{"num_layers": 1, "inner": {"width": 9}}', "inner.width is 9, expected from 1 to 8"),
        ('{"num_layers": 1, "by_name": {"x": [1, null]}}', r"by_name.x\[1\] is null, expected a whole number"),
        ('{"num_layers": 1, "num_layers": 2}', 'the key "num_layers" stands twice'),
        ('{"num_layers": 1, "x": "\\ud800"}', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ('{"num_layers": 1, "x": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 100"),
        ("[" * 1_000_000, "nested too deeply"),
        ('{"num_layers": 1', "is not valid JSON"),
        ("{'a': 1}", "is not valid JSON"),
    ],
)
def test_json_is_told_by_file_field_found_and_expected(text, told, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json.*{told}") as error:
        read_json(tmp_path / "a.json", Outer)
    assert len(str(error.value)) < 400 + len(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "is empty"),
        ("a: b: c", "mapping values are not allowed"),
        ("a: 1\na: 2", 'the key "a" stands twice'),
        ("num_layers: yes", "num_layers is true, expected a whole number"),
        ("num_layers: .inf", "inf is no number"),
        ("num_layers: 1\nscale: 1e5", 'scale is "1e5", expected a number'),
        ("? [1]\n: 2", "unhashable"),
        ("1: 2", "is no text"),
        ("a: &x [*x]", "an alias stands for what it is part of"),
        ("a: *x", "undefined alias"),
        ("--- 1\n--- 2", "single document"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("!!set {a}", "is a set"),
        ("a: " + "9" * 9999, "digits"),
        ("a: 0b" + "1" * 9999, "digits"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 100_000, "nested deeper"),
        ("a: \0", "control characters"),
        ("[" + "a," * 300_000 + "]", "more than 100,000 values"),
        (
            "\n".join(["b0: &b0 {k: v}", *(f"b{i}: &b{i} [" + f"*b{i - 1}," * 9 + "]" for i in range(1, 30))]),
            "aliases stand for",
        ),
        ("\n".join(["b0: &b0 1", *(f"b{i}: &b{i} [*b{i - 1}]" for i in range(1, 200))]), "nested deeper"),
        ((BAD / "merge_bomb.yaml").read_text(), "aliases stand for"),
    ],
)
def test_yaml_is_told_at_once(text, told, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UserError, match=f"a.yaml.*{told}"):
        read_yaml(tmp_path / "a.yaml", Outer)
    assert time.process_time() - start < 2


def test_yaml_with_aliases_that_repeat_little_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &x {k: 1}\nb: *x\nc: {<<: *x, l: 2}\nd: 2026-01-02\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}, "d": "2026-01-02"}


def test_values_that_no_file_holds_are_refused_too():
    assert checked({"a": (1)}, dict[str, int], "it") == {"a": 1}
    with pytest.raises(UserError, match="it: a is {}, expected a whole number"):
        checked({"a": {}}, dict[str, int], "it")
    assert parse_json('{"a": 1000000000000000019884624838656}', "it") == {"a": 1000000000000000019884624838656}


def test_files_are_regular_and_not_too_long(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="a.json is not UTF-8 text .byte 0 is 0xff"):
        read_text(tmp_path / "a.json", 100)
    with pytest.raises(UserError, match="a.json has 3 bytes, at most 2 were expected"):
        read_bytes(tmp_path / "a.json", 2)
    os.mkfifo(tmp_path / "pipe.json")
    for path, told in (
        (tmp_path / "pipe.json", "is a named pipe"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "is a device"),
        (tmp_path / "a.json" / "b", "Not a directory"),
        ("a\0", "can't be the name"),
        ("\ud800", "can't be the name"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "b", "does not exist; look again"),
    ):
        with pytest.raises(UserError, match=told):
            regular_file(path, "look again")


def test_names_within_a_folder():
    assert inside("folder", "a/b.png", "list.json") == Path("folder/a/b.png")
    for name in ("", "/a", "..", "a/../..", "a\\b", "a\0"):
        with pytest.raises(UserError, match="list.json names the file .* does not lie in its folder"):
            inside("folder", name, "list.json")


def test_any_is_any():
    assert checked({"a": [1, None, "x", 2.5, True]}, dict[str, Any], "it") == {"a": [1, None, "x", 2.5, True]}
