"""Text files of strangers: YAML, TOML and JSON, each by one function that answers at once or refuses in one line.

A file may have so many bytes, be nested so deep, and hold so much once its aliases are followed; whole numbers fit into
64 bits. YAML is read as version 1.2 does: ``2e-3`` is a number, ``no`` and ``2026-12-01`` are texts.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bkind3d.errors import InputError, brief, first_line, shown

_BYTES = 2 << 20  # of a YAML file
_TOML_BYTES = 512 << 10
_DATA_BYTES = 64 << 20  # of one that this package writes
_DEPTH = 32
_PARTS = 200_000  # keys, values, lists and tables, aliases followed
_KEY_PARTS = 32  # of a dotted key of TOML, whose time grows with the square of them


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values; an empty one has none.

    Raises:
        InputError: it cannot be read, is not YAML, is too large or too deep, or holds no keys.
    """
    content = parse_yaml(read_text(path, _BYTES), str(path))
    return _as_table(path, {} if content is None else content)


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text says; `name` tells where it is from in messages.

    Raises:
        InputError: as :func:`read_yaml`.
    """
    with broken_file(f"{name}: not a YAML file"):
        return yaml_of(text)


def yaml_of(text: str, loader: Any = None) -> Any:
    """As :func:`parse_yaml`, by a loader that knows further types where one is named; raises what the parser raises."""
    if len(text) > _BYTES:
        raise ValueError(f"larger than {_BYTES >> 10} KiB, which no such file needs")
    _require_few(text)
    return _checked(yaml.load(text, Loader=loader or _Loader))


def dump_yaml(content: dict[str, Any]) -> str:
    """A text that :func:`parse_yaml` reads as the same content: plain dictionaries, lists, texts and numbers."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: it cannot be read, is not TOML, or is too large or too deep.
    """
    text = read_text(path, _TOML_BYTES)
    with broken_file(f"{path}: not a TOML file"):
        return toml_of(text)


def toml_of(text: str) -> dict[str, Any]:
    """What a TOML text says; raises what the parser raises, or ValueError where it is too large or too deep."""
    if len(text) > _TOML_BYTES:
        raise ValueError(f"larger than {_TOML_BYTES >> 10} KiB, which no such file needs")
    if _DOTTED.search(_STRINGS.sub("x", text)):
        raise ValueError(f"a key of more than {_KEY_PARTS} parts")
    return _checked(tomllib.loads(text))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        InputError: it cannot be read, is not JSON, is too large or too deep, or is no object.
    """
    return _as_table(path, parse_json(read_text(path, _DATA_BYTES), str(path)))


def parse_json(text: str, name: str) -> Any:
    """What a JSON text says; `name` tells where it is from in messages.

    Raises:
        InputError: as :func:`read_json`.
    """
    with broken_file(f"{name}: not valid JSON"):
        return json_of(text)


def json_of(text: str) -> Any:
    """What a JSON text says; raises what the parser raises, or ValueError where it is too deep."""
    return _checked(json.loads(text))


def read_text(path: Path, limit: int = _DATA_BYTES) -> str:
    """Read a text file of at most so many bytes.

    Raises:
        InputError: it is not there, no text, or larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{shown(str(path))}: not a name of a file") from None
    if len(data) > limit:
        raise InputError(f"{path}: larger than {limit >> 10} KiB, which no such file needs")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error})") from None


@contextmanager
def broken_file(what: str) -> Iterator[None]:
    """Whatever is raised while a foreign file is read is said of the file, in one line: ``what`` and the reason.

    Raises:
        InputError: in place of any other exception.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{what} (it needs more memory than there is)") from None
    except RecursionError:
        raise InputError(f"{what} (nested too deep)") from None
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{what} ({brief(' '.join(str(error).split()))})") from None
    except Exception as error:  # libraries have many words for a file that is broken
        name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise InputError(f"{what} ({name}{brief(first_line(error))})") from error


def _as_table(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, not {shown(content)}")
    return content


def _checked(content: Any) -> Any:
    """The content, if it is not too deep and its whole numbers have at most 64 bits."""
    level = [content]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
                raise ValueError("a whole number of more than 64 bits")
        if not below:
            return content
        level = below
    raise ValueError(f"nested deeper than {_DEPTH}")


# --- YAML ---------------------------------------------------------------------------------------------------------

_CLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_CLoader):
    """Knows the types of :data:`_CORE`."""


class _Dumper(yaml.SafeDumper):
    """Quotes texts that :class:`_Loader`, or a reader of YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# The core schema of YAML 1.2, without its octal and hexadecimal numbers; 012 stays a text, as a camera may be called.
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|"
        r"\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _require_few(text: str) -> None:
    """Refuse a YAML text that is nested too deep or grows too large once its aliases are followed, before it is built.

    One pass over the events of the parser: the parts of each list or table are counted when it ends, those of one that
    has an anchor are counted again for each alias of it.
    """
    open_parts, anchors, sizes = [0], [""], {}
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_parts.append(1)
            anchors.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            size = open_parts.pop()
            if anchor := anchors.pop():
                sizes[anchor] = size
            open_parts[-1] += size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(
                    f"the alias *{brief(str(event.anchor))} stands before or within what it is an alias of"
                )
            open_parts[-1] += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            open_parts[-1] += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if len(open_parts) > _DEPTH:
            raise ValueError(f"nested deeper than {_DEPTH}")
        if open_parts[-1] > _PARTS:
            raise ValueError(f"more than {_PARTS} parts")


# --- TOML ---------------------------------------------------------------------------------------------------------

_STRINGS = re.compile(
    r'"""(?:[^"\\]|\\[\s\S]|"(?!""))*+(?:""")?|'
    r"'''(?:[^']|'(?!''))*+(?:''')?|"
    r'"(?:[^"\\\n]|\\.)*+"?|'
    r"'[^'\n]*+'?"
)
_DOTTED = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{_KEY_PARTS}}}")
