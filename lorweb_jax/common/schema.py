"""JSON and YAML that users bring: parsed within bounds, and checked field by field against a type.

`read_json(path, Type)` and `read_yaml(path, Type)` return a `Type`: a dataclass, or anything else that pydantic knows,
such as dict[str, int]. Types are strict (true is no integer, "4" neither), unknown fields are passed over, and a range
stands beside its field:

    @dataclasses.dataclass(frozen=True)
    class Sizes:
        num_layers: Blocks                                   # required, 0..1000
        scale: Annotated[float, Between(0.0, 1e4)] = 1.0     # optional
        kind: Literal["a", "b"] = "a"
        next_to: SomeOtherDataclass | None = None

Without a type they return what the file holds. Whatever is wrong is a UserError: file, field, found, expected. pydantic
is imported at the first check, so that modules may describe their files without it.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.user_files import read_text

CONFIG_BYTES = 4_000_000  # of a config.json; the largest published ones list thousands of labels in 1 MB
INDEX_BYTES = 64_000_000  # of lists of tensors, images or words
_DIGITS = 40  # of a whole number; tokenizers write 10^30 for "no limit"
_DEPTH = 100  # of lists and mappings within each other
_YAML_NODES = 100_000  # of a YAML document after its aliases are replaced by what they stand for
_SHOWN = 60  # characters of a value in a message


class Between(NamedTuple):
    """An annotation: a number from `least` to `most`, both allowed; or a list or text of such a length.

    For one value alone too: as a Literal, 1.0 and true would pass for 1.
    """

    least: float
    most: float

    def __str__(self) -> str:
        if self.least == self.most:
            return json.dumps(self.least)
        return f"from {self.least:,} to {self.most:,}" if self.most < math.inf else f"at least {self.least:,}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: Any) -> Any:
            number = isinstance(value, (int, float))
            if not self.least <= (value if number else len(value)) <= self.most:
                raise PydanticCustomError("between", "{range}", {"range": f"{'' if number else 'a length '}{self}"})
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


# Sizes of models. The largest published ones of these kinds stay far below; what a file claims is checked before
# anything of that size is made.
Blocks = Annotated[int, Between(0, 1000)]
Width = Annotated[int, Between(1, 65536)]
Heads = Annotated[int, Between(1, 1024)]
Words = Annotated[int, Between(1, 2_000_000)]
Pixels = Annotated[int, Between(1, 16384)]
Epsilon = Annotated[float, Between(0.0, 1.0)]


def read_json(
    path: str | Path, schema: Any = None, *, limit: int = CONFIG_BYTES, remedy: str = "check the path"
) -> Any:
    """What a JSON file of at most `limit` bytes holds, as `schema`; by default an object (dict) of anything."""
    return checked(parse_json(read_text(path, limit, remedy), path), schema or dict[str, Any], path)


def read_yaml(path: str | Path, schema: Any = None, *, limit: int = 1_000_000, remedy: str = "check the path") -> Any:
    """What a YAML file holds, as `schema`; by default a mapping of anything."""
    return checked(_parse_yaml(read_text(path, limit, remedy), path), schema or dict[str, Any], path)


def parse_json(text: str, source: str | Path) -> Any:
    """The value of a JSON text from `source`, a file's name. UserError where `json_value` raises ValueError."""
    try:
        return json_value(text)
    except ValueError as error:
        wrong = f"is not valid JSON ({error})" if text.strip() else "is empty, JSON was expected"
        raise UserError(f"{source} {wrong}; {_AGAIN}") from None


def json_value(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError, in words for a person, for text that isn't JSON, a key that stands twice in an object,
    not-a-number and infinities, whole numbers of more than 40 digits, text that isn't Unicode (half a surrogate pair),
    and more than 100 levels.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_short
        )
        _check_plain(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def checked(value: Any, schema: Any, source: str | Path) -> Any:
    """A plain value (dicts with text keys, lists, text, numbers, true, false, null) as `schema`.

    Raises UserError that names `source`, the first field that is wrong, what it is and what it should be.
    """
    from pydantic import ValidationError

    try:
        # As JSON, for which strict means: lists may become tuples, and no number or text becomes anything else.
        return _adapter(schema).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise UserError(f"{source}: {_sentence(problems[0])}{_others(problems)}; {_AGAIN}") from None


def require_class(values: dict[str, Any], name: str, source: str | Path) -> None:
    """UserError if a config of diffusers says that it is of another class than `name`."""
    if (actual := values.get("_class_name", name)) != name:
        raise UserError(
            f"{source} is the config of a {shown(actual)}, a {name} was expected; use the folder of a FLUX.1 "
            "Kontext pipeline"
        )


def as_dataclass(values: Any, kind: type) -> Any:
    """The dataclass `kind` from another one that has its fields, such as a file's with more of them."""
    return kind(**{field.name: getattr(values, field.name) for field in dataclasses.fields(kind)})


_AGAIN = "correct it or download it again"


@functools.lru_cache(maxsize=256)
def _adapter(schema: Any):
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


# pydantic's names of errors -> what was expected; for others its own words do.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object {…}",
    "dataclass_type": "an object {…}",
    "none_required": "null",
}


def _sentence(problem: Mapping[str, Any]) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    if problem["type"] in ("missing", "missing_argument"):
        return f"{_cut(field)} is missing"
    expected = _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Input should be ")
    return f"{_cut(field) if field else 'the whole'} is {shown(problem['input'])}, expected {expected}"


def _others(problems: Sequence[Any]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""


def shown(value: Any) -> str:
    """A value as a message shows it: JSON in ASCII, cut where it is long."""
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice in an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_SHOWN]} is beyond the range of floating point")
    return value


def _short(text: str) -> int | float:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits, at most {_DIGITS} were expected")
    return -0.0 if text == "-0" else int(text)  # no whole number in other languages' JSON either


def _check_plain(value: Any) -> None:
    """ValueError for what JSON has no name for, broken text, infinities, and too many levels."""
    level = [value]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise ValueError(f"the key {key!r:.{_SHOWN}} is no text")
                    _check_text(key)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float):
                if not math.isfinite(item):
                    raise ValueError(f"{item} is no number")
            elif isinstance(item, int):
                if abs(item) >= 10**_DIGITS:
                    raise ValueError(f"a whole number has more than {_DIGITS} digits")
            elif item is not None:
                raise ValueError(
                    f"{item!r:.{_SHOWN}} is a {type(item).__name__}; text, numbers, lists and mappings were expected"
                )
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {_DEPTH} levels")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{shown(text)} holds half a surrogate pair") from None


def _parse_yaml(text: str, source: str | Path) -> Any:
    import yaml

    loader_class = _yaml_loader()
    try:
        # Events come one by one, so that depth and length are known before anything recurses.
        _check_events(yaml.parse(text, loader_class), yaml)
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ValueError("it is empty")
            _measure(node, {}, yaml)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
        _check_plain(value)
    except Exception as error:  # PyYAML's constructors raise nearly every kind
        raise UserError(f"{source} is not valid YAML ({' '.join(str(error).split())[:200]}); {_AGAIN}") from None
    return value


@functools.cache
def _yaml_loader() -> type:
    import yaml

    # libyaml's where PyYAML was built with it: twenty times as fast.
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    resolvers = {
        first: [(tag, pattern) for tag, pattern in patterns if not tag.endswith(":timestamp")]
        for first, patterns in base.yaml_implicit_resolvers.items()
    }
    return type("PlainLoader", (base,), {"yaml_implicit_resolvers": resolvers})  # a date is text, as in JSON


def _check_events(events: Iterator[Any], yaml: Any) -> None:
    depth = 0
    for count, event in enumerate(events):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError(f"nested deeper than {_DEPTH} levels")
        if count > 2 * _YAML_NODES:
            raise ValueError(f"more than {_YAML_NODES:,} values")


def _measure(node: Any, known: dict[int, tuple[int, int] | None], yaml: Any, level: int = 0) -> tuple[int, int]:
    """(values, levels) of a node with its aliases written out, as constructing and merging (<<) would have them."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError("an alias stands for what it is part of")
    else:
        known[id(node)], size = None, (1, 1)
        children = []
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                key = next(key for key in keys if keys.count(key) > 1)[1]
                raise ValueError(f"the key {shown(key)} stands twice in a mapping")
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        for child in children:
            values, levels = _measure(child, known, yaml, level + 1)
            size = size[0] + values, max(size[1], levels + 1)
        known[id(node)] = size
    if level + size[1] > _DEPTH:
        raise ValueError(f"nested deeper than {_DEPTH} levels")
    if size[0] > _YAML_NODES:
        raise ValueError(f"its aliases stand for more than {_YAML_NODES:,} values")
    return size
