"""YAML text -> a tree of values that remember the file and line they stand in.

A small, closed YAML: YAML 1.2 scalars (`1e-4` is a number, `off` is text), one document, no aliases, no tags beyond
the plain ones, no key twice.  So a file of strangers can neither blow up nor construct anything.
Knows nothing of recipes; torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from afd_data.errors import UserError

MAX_BYTES = 1_000_000
_TAG = "tag:yaml.org,2002:"
_MEANT = {"bool": "true or false", "int": "a whole number", "float": "a number", "null": "null"}


@dataclass(frozen=True)
class Place:
    """Where a value stands: `label` for people (`recipes/my.yaml:12` or `--set`), `folder` for its relative paths."""

    label: str
    folder: Path


@dataclass(frozen=True)
class Value:
    """A mapping, a list or a scalar (str, int, float, bool, None) with the place of its key."""

    data: Mapping[str, Value] | tuple[Value, ...] | str | int | float | bool | None
    place: Place


def parse_yaml(text: str, name: str, folder: Path, problems: list[str]) -> Value:
    """Read one document.  `name` is how the text is called in messages; lines are added to it unless it is an option.

    Repeated keys and odd scalars are added to `problems`; raises UserError where the text is no YAML at all.
    """
    try:
        node = _Loader(text).get_single_node()
        if node is None:
            return Value(None, Place(_label(name, 0), folder))
        return _Converter(name, folder, problems).value(node, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{_label(name, mark.line if mark else 0)}: not YAML: {_explain(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply for a recipe") from None


def plain(value: Value) -> object:
    """The tree as ordinary dicts, lists and scalars."""
    if isinstance(value.data, Mapping):
        return {key: plain(child) for key, child in value.data.items()}
    if isinstance(value.data, tuple):
        return [plain(item) for item in value.data]
    return value.data


def locate(value: Value, path: tuple[str | int, ...]) -> Place:
    """The place of the deepest value along `path`: its key's line, or that of the section that lacks it."""
    for step in path:
        child = child_of(value, step)
        if child is None:
            break
        value = child
    return value.place


def child_of(value: Value, step: str | int) -> Value | None:
    """The value under a key or an index; None if there is none."""
    if isinstance(value.data, Mapping) and isinstance(step, str):
        return value.data.get(step)
    if isinstance(value.data, tuple) and isinstance(step, int) and step < len(value.data):
        return value.data[step]
    return None


class _Loader(yaml.SafeLoader):
    """Composes nodes only; scalars get YAML 1.2's meanings, since 1.1 reads `1e-4` as text and `off` as false."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way to override the table)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                None, None, "aliases (*name) are not read; write the value out, or use `extends:`", mark
            )
        return super().compose_node(parent, index)


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))


class _Converter:
    """Nodes of one text -> Values; collects what is wrong on the way."""

    def __init__(self, name: str, folder: Path, problems: list[str]):
        self.name, self.folder, self.problems = name, folder, problems

    def value(self, node: yaml.Node, key: yaml.Node, path: tuple[str, ...] = ()) -> Value:
        """`key` is the node whose line stands for the value's place; `path` leads to the value."""
        place = Place(_label(self.name, key.start_mark.line), self.folder)
        if isinstance(node, yaml.MappingNode):
            return Value(self._mapping(node, path), place)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return Value(tuple(self.value(item, item, (*path, str(index))) for index, item in items), place)
        return Value(self._scalar(node, place, path), place)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Value]:
        result: dict[str, Value] = {}
        for key, child in node.value:
            label = _label(self.name, key.start_mark.line)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{label}: a key must be a word, got a {key.id}")
            elif key.value in result:
                first = result[key.value].place.label.rpartition(":")[2]
                self.problems.append(f"{label}: {'.'.join((*path, key.value))}: given twice, first in line {first}")
            else:
                result[key.value] = self.value(child, key, (*path, key.value))
        return result

    def _scalar(self, node: yaml.Node, place: Place, path: tuple[str, ...]) -> str | int | float | bool | None:
        kind, text = node.tag.removeprefix(_TAG), node.value
        where = ": ".join(filter(None, (place.label, ".".join(path))))
        readers = {
            "null": lambda _: None,
            "bool": lambda word: {"true": True, "false": False}[word.lower()],
            "int": lambda digits: int(digits, 0 if digits[:2] in ("0x", "0o") else 10),
            "float": lambda number: float(number.replace(".inf", "inf").replace(".nan", "nan")),
            "str": _checked_text,
        }
        if kind not in readers:
            self.problems.append(f"{where}: the tag {node.tag} is not read; write a plain value")
            return None
        try:
            return readers[kind](text if kind == "str" else text.lower())
        except (ValueError, KeyError):
            meant = _MEANT.get(kind, "text without control characters")
            self.problems.append(f"{where}: {text[:40]!r} is not {meant}")
            return None


def _checked_text(text: str) -> str:
    """Text that a file name and JSON can hold.  Raises ValueError (UnicodeEncodeError for lone surrogates)."""
    text.encode()
    if "\0" in text:
        raise ValueError("NUL")
    return text


def _label(name: str, line: int) -> str:
    return name if name.startswith("--") else f"{name}:{line + 1}"


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "a tab stands where YAML wants spaces"
    if "mapping values are not allowed" in problem:
        return "a second `:` in one line; put the text in quotes, or check the indentation"
    if "single document" in (error.context or ""):
        return "more than one document (`---`); a recipe is one"
    return f"{error.context}: {problem}" if error.context else problem
