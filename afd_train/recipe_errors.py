"""pydantic's complaints about a recipe -> sentences that name place, key, what was got and what is allowed.

Also the little that has to be known of the sections' types for that: which class stands at a key path.  Torch-free.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from afd_data.section import Config
from afd_train.recipe_yaml import Value, child_of, locate

# An annotation's class -> where it keeps its limit, and how to say it.
_RULES = {
    annotated_types.Ge: ("ge", ">= {}"),
    annotated_types.Gt: ("gt", "> {}"),
    annotated_types.Le: ("le", "<= {}"),
    annotated_types.Lt: ("lt", "< {}"),
    annotated_types.MultipleOf: ("multiple_of", "a multiple of {}"),
    annotated_types.MinLen: ("min_length", "with at least {} entry"),
}
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "a list",
    "model_type": "a section (lines of `key: value`)",
    "dict_type": "a section (lines of `key: value`)",
    "model_attributes_type": "a section (lines of `key: value`)",
}
Path = tuple[str | int, ...]


def problems_of(error: ValidationError, tree: Value, model: type[Config]) -> list[str]:
    """One sentence for every complaint, `PLACE: key.path: what is wrong`, in the order of the file's sections."""
    lines = []
    for item in error.errors():
        path, section, field = _walk(item["loc"], tree, model)
        text = _sentence(item, path, section, field, model)
        if item["type"] in ("value_error", "union_tag_invalid", "union_tag_not_found"):
            # These sentences begin with the key that they are about, relative to its section.
            key, _, text = text.partition(": ")
            path = (*path, *key.split("."))
        lines.append(f"{locate(tree, path).label}: {dotted(path)}: {text}" if path else f"{tree.place.label}: {text}")
    return lines


def place_and_key(problem: str) -> str:
    """`recipes/my.yaml:12: train.steps` of a problem's line."""
    return ": ".join(problem.split(": ")[:2])


def dotted(path: Iterable[str | int]) -> str:
    """`("pretrain", 0, "steps")` -> `pretrain.0.steps`, with anything unprintable escaped."""
    return ".".join(str(step) if str(step).isprintable() else ascii(step) for step in path)


def section_class(annotation: Any, value: Value | None) -> type[BaseModel] | None:
    """The section class of a field or list item; for a tagged union the one that `value`'s `name` picks, if any."""
    classes = list(_classes(annotation))
    if len(classes) < 2:
        return classes[0] if classes else None
    tag = child_of(value, "name") if value else None
    return next((cls for cls in classes if tag and _tag(cls) == tag.data), None)


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def shown(value: object) -> str:
    """A value as it would stand in YAML, cut to a line's length, control characters escaped."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(loc: Path, tree: Value, model: type[BaseModel]) -> tuple[Path, type[BaseModel] | None, FieldInfo | None]:
    """Follow pydantic's location (which holds union tags too): key path, innermost section, field at the end."""
    path: list[str | int] = []
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    value: Value | None = tree
    tags: list[str] = []
    for step in loc:
        if step in tags:
            tags = []
            continue
        path.append(step)
        if isinstance(step, str):
            field = section.model_fields.get(step) if section else None
        value = child_of(value, step) if value else None
        inner = field and section_class(field.annotation, value)
        section = inner or section
        unions = list(_classes(field.annotation)) if field else []
        tags = [_tag(cls) for cls in unions] if len(unions) > 1 and value else []
    return tuple(path), section, field


def _sentence(item: Any, path: Path, section: type[BaseModel] | None, field: FieldInfo | None, model: Any) -> str:
    kind, got = item["type"], item["input"]
    match kind:
        case "extra_forbidden":
            return _unknown_key(str(path[-1]), section, model)
        case "missing":
            return _missing(path, field)
        case "union_tag_not_found":
            return f"name: missing. Allowed: {', '.join(_tags(field))}"
        case "union_tag_invalid":
            tag = got.get("name") if isinstance(got, dict) else got
            return f"name: {_choose(tag, _tags(field))}"
        case "literal_error":
            return _choose(got, [str(choice) for choice in _choices(field.annotation)] if field else [])
        case "value_error":
            return str(item["ctx"]["error"])
        case "too_long":
            return f"expected at most {item['ctx']['max_length']} entries, got {shown(got)}"
        case _:
            return _expected(kind, item["msg"], got, "" if isinstance(path[-1], int) else _limits(field))


def _missing(path: Path, field: FieldInfo | None) -> str:
    if isinstance(path[-1], int):
        return "missing: the list is too short"
    meaning = f" ({field.description})" if field and field.description else ""
    return f"missing{meaning}. Add it, or give --set {dotted(path)}=VALUE"


def _choose(got: object, choices: list[str]) -> str:
    return f"got {shown(got)}. Allowed: {', '.join(choices)}.{did_you_mean(got, choices)}"


def _expected(kind: str, message: str, got: object, limits: str) -> str:
    expected = _KINDS.get(kind) or message.removeprefix("Input should be ")
    if limits and (kind in ("int_type", "float_type", "finite_number", "too_short") or kind not in _KINDS):
        expected = f"{_KINDS.get(kind, 'a number')} {limits}"
    hint = f'. Put it in quotes: "{got}"' if kind == "string_type" and isinstance(got, int | float) else ""
    return f"expected {expected}, got {shown(got)}{hint}"


def _unknown_key(key: str, section: type[BaseModel] | None, model: type[Config]) -> str:
    allowed = list(section.model_fields) if section else []
    hint = did_you_mean(key, allowed)
    if not hint:
        homes = [f"{home}.{key}".lstrip(".") for home, cls in _sections(model) if key in cls.model_fields]
        hint = f" Did you mean {' or '.join(list(dict.fromkeys(homes))[:3])}?" if homes else ""
    return f"unknown key.{hint} Allowed here: {', '.join(allowed)}"


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a recipe with its key path; list items stand under index 0."""
    yield prefix, model
    for key, field in model.model_fields.items():
        index = ".0" if get_origin(field.annotation) is tuple else ""
        for cls in _classes(field.annotation):
            yield from _sections(cls, f"{prefix}.{key}{index}".lstrip("."))


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _classes(part)


def _tag(cls: type[BaseModel]) -> str:
    return str(cls.model_fields["name"].default)


def _tags(field: FieldInfo | None) -> list[str]:
    return [_tag(cls) for cls in _classes(field.annotation)] if field else []


def _choices(annotation: Any) -> list[object]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _limits(field: FieldInfo | None) -> str:
    """The field's range in signs: `>= 8, <= 4096, a multiple of 2`."""
    words = []
    for rule in field.metadata if field else ():
        name, wording = _RULES.get(type(rule), ("", ""))
        if name:
            words.append(wording.format(getattr(rule, name)))
    return ", ".join(words)
