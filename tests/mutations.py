"""Damage to files, drawn from a seed: bytes, safetensors headers, and the values within JSON and YAML."""

import json
import math
import random as stdlib_random
import struct
from typing import Any

import yaml

Random = stdlib_random.Random

# What no field expects; a list or text of some length, names of files elsewhere, broken text.
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    255,
    10**4,
    10**9,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**50,
    0.5,
    1.0,
    -0.0,
    1e-300,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "1",
    "x",
    "None",
    "../../outside",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "é",
    "x" * 5000,
    [],
    [[]],
    [1],
    [None] * 3,
    [1, "x"],
    list(range(300)),
    {},
    {"a": 1},
    {"": None},
]


def of_bytes(random: Random, data: bytes) -> bytes:
    """Cut short, some bits turned, bytes written over, taken out, put in or repeated, or added at the end."""
    data = bytearray(data)
    kind = random.choice(
        ["cut", "flip", "flip", "flip", "write", "zeros", "delete", "insert", "repeat", "append", "all"]
    )
    start = random.randrange(len(data) + 1)
    length = min(len(data) - start, int(2 ** random.uniform(0, 8)))
    match kind:
        case "cut":
            del data[start:]
        case "flip" if data:
            for _ in range(random.choice([1, 1, 1, 2, 8, 64])):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case "write":
            data[start : start + length] = random.randbytes(length)
        case "zeros":
            data[start : start + length] = bytes(length)
        case "delete":
            del data[start : start + length]
        case "insert":
            data[start:start] = random.randbytes(max(length, 1))
        case "repeat":
            data[start:start] = data[start : start + length]
        case "append":
            data += random.choice([b"\0", b"\n", b"x", random.randbytes(64)])
        case "all":
            data = bytearray(
                random.choice([b"", b"\0", b"{}", b"[]", b"null", b"\xff\xfe", b"\n" * 9, random.randbytes(99)])
            )
    return bytes(data)


def of_value(random: Random, value: Any) -> Any:
    """The value with one to three of its parts replaced, taken out, put in elsewhere, or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice([1, 1, 1, 1, 2, 3])):
        value = _changed(random, value)
    return value


def _changed(random: Random, value: Any) -> Any:
    below = isinstance(value, (dict, list)) and len(value) > 0
    if below and random.random() < 0.85:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        place = random.choice(places)
        kind = random.choice(["within", "within", "within", "within", "delete", "rename", "swap", "copy"])
        if kind == "delete":
            del value[place]
        elif kind == "rename" and isinstance(value, dict):
            value[place + random.choice(["_", "\ud800", ""])] = value.pop(place)
        elif kind == "swap":
            other = random.choice(places)
            value[place], value[other] = value[other], value[place]
        elif kind == "copy" and isinstance(value, dict):
            value[str(random.choice(ODD))[:99]] = value[place]
        elif kind == "copy":
            value.insert(place, value[place])
        else:
            value[place] = _changed(random, value[place])
        return value
    if isinstance(value, bool):
        return random.choice([not value, *ODD])
    if isinstance(value, (int, float)) and random.random() < 0.4:
        return random.choice(
            [value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value), [value]]
        )
    if random.random() < 0.1:
        return random.choice([[value], {"x": value}])
    if random.random() < 0.02:
        for _ in range(300):
            value = [value]
        return value
    return json.loads(json.dumps(random.choice(ODD)))


def of_json(random: Random, data: bytes) -> bytes:
    """Of a JSON file: its values, keys that stand twice, or its bytes."""
    if random.random() < 0.35:
        return of_bytes(random, data)
    value = of_value(random, json.loads(data))
    if isinstance(value, dict) and value and random.random() < 0.05:
        key = random.choice(list(value))
        return (
            b'{"%s":%s,' % (key.encode("utf-8", "replace"), json.dumps(random.choice(ODD)).encode())
            + json.dumps(value).encode()[1:]
        )
    return json.dumps(value, ensure_ascii=random.random() < 0.9).encode("utf-8", "surrogatepass")


def of_json_lines(random: Random, data: bytes) -> bytes:
    """Of a text: its bytes, or whole lines."""
    if random.random() < 0.5:
        return of_bytes(random, data)
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    lines[place : place + random.randrange(2)] = random.choice(
        [[], [b""], [lines[place]], [b"\xff\0"], [lines[place] + b" x"], [b"x" * 9999], [b"1" * 5000], lines[:3]]
    )
    return b"\n".join(lines)


def of_yaml(random: Random, data: bytes) -> bytes:
    """Of a YAML file: its values, aliases, tags, or its bytes."""
    if random.random() < 0.35:
        return of_bytes(random, data)
    if random.random() < 0.1:
        added = random.choice(
            [
                "\na: &a [*a]",
                "\na: &a {<<: *a}",
                "\n<<: {config: 1}",
                "\nconfig: 1",
                "\nx: *y",
                "\nx: !!python/name:os.system",
                "\nx: !!binary x",
                "\nx: 2026-99-99",
                "\n? [a]\n: b",
                "\n--- 1",
                "\nx: " + "[" * 500,
                "\n1: 2",
                "\nx: !!bool x",
                "\n" + "\n".join(f"b{i}: &b{i} [" + f"*b{i - 1}," * 9 + "]" if i else "b0: &b0 x" for i in range(9)),
            ]
        )
        return data.rstrip() + added.encode() + b"\n"
    value = of_value(random, yaml.safe_load(data))
    text = json.dumps(value) if random.random() < 0.3 else yaml.safe_dump(value, allow_unicode=random.random() < 0.3)
    return text.encode("utf-8", "surrogatepass")


def of_safetensors(random: Random, data: bytes) -> bytes:
    """Of a safetensors file: its header's values, the header's length, the data's length, or its bytes."""
    if random.random() < 0.35:
        return of_bytes(random, data)
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = random.choice(
        ["values", "values", "values", "values", "text", "length", "rest", "offsets", "dtype", "twice"]
    )
    value = json.loads(header)
    names = [name for name in value if name != "__metadata__"]
    entry = value[random.choice(names)]
    match kind:
        case "values":
            value = of_value(random, value)
        case "offsets":
            entry["data_offsets"][random.randrange(2)] += random.choice([-8, -4, -1, 1, 4, 8, 10**9, 2**63, -(10**9)])
        case "dtype":
            entry["dtype"] = random.choice(
                [
                    "F64",
                    "F32",
                    "F16",
                    "BF16",
                    "F8_E4M3",
                    "F8_E5M2",
                    "F8_E8M0",
                    "F4",
                    "F6_E2M3",
                    "I64",
                    "I8",
                    "U8",
                    "U16",
                    "BOOL",
                    "C64",
                    "f32",
                    "",
                    None,
                    1,
                    ["F32"],
                ]
            )
        case "rest":
            rest = of_bytes(random, rest) if rest else b"x"
    header = json.dumps(value).encode()
    if kind == "text":
        header = of_bytes(random, header)
    elif kind == "twice":
        name = random.choice(names)
        header = header[:-1] + b"," + json.dumps({name: value[name]}).encode()[1:]
    claimed = len(header)
    if kind == "length":
        claimed = random.choice(
            [
                0,
                1,
                2,
                claimed - 1,
                claimed + 1,
                claimed + len(rest),
                2**31,
                2**36,
                2**63,
                2**64 - 1,
                100_000_000,
                100_000_001,
                random.randrange(2**64),
            ]
        )
    return struct.pack("<Q", max(claimed, 0)) + header + rest
