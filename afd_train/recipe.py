"""A recipe's name -> a validated `Recipe`.

YAML with `extends:` (one parent) and `--set key.path=value`; children win, mappings merge, lists are replaced, and a
section whose `name` changes is replaced as a whole.  Every mistake is reported at once, with its file and line.

Relative paths: what belongs to a recipe (`prompts.source`, `prompts.test_source`, `extends`) is found beside the file
that names it and becomes absolute here; what belongs to the machine (`out`, `teacher.path`, `cache.folder`,
`stream.folder`, `student.init`, an objective's `real`) is relative to where `afd` runs, as is everything given with
`--set`.
Torch-free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from afd_data.errors import UserError
from afd_train.config import Recipe
from afd_train.recipe_errors import did_you_mean, dotted, place_and_key, problems_of, section_class
from afd_train.recipe_yaml import MAX_BYTES, Place, Value, child_of, parse_yaml, plain
from afd_train.shipped import shipped_folder, shipped_recipes

_BESIDE_THE_RECIPE = ("source", "test_source")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the file it came from, and the merged tree that knows where each given value stands."""

    recipe: Recipe
    file: Path
    tree: Value


def load_recipe(name_or_path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of a file (`my.yaml`, `recipes/my`) or one that afd ships (`quickstart`), with `key.path=value` sets.

    Raises UserError that lists every problem: place, key, what was got, what is allowed.
    """
    return read_recipe(name_or_path, sets).recipe


def read_recipe(name_or_path: str | Path, sets: Sequence[str] = ()) -> LoadedRecipe:
    """`load_recipe` that also tells where every value came from."""
    file = _find(str(name_or_path), Path(), "recipe")
    problems: list[str] = []
    tree = _with_parents(file, (), problems)
    # A new `name` replaces its section, so it goes before the other values that are set in there.
    for text in sorted(sets, key=lambda text: not text.partition("=")[0].endswith(".name")):
        tree = _with_set(tree, text, problems)
    tree = _filled(_absolute_prompts(tree), Recipe)
    recipe = None
    try:
        recipe = Recipe.model_validate_json(json.dumps(plain(tree)), strict=True)
    except ValidationError as error:
        # What YAML could not read has been said; that it is missing now would say it twice.
        told = {place_and_key(problem) for problem in problems}
        problems += [line for line in problems_of(error, tree, Recipe) if place_and_key(line) not in told]
    if recipe is None or problems:
        head = f"{len(problems)} problems in {_display(file)}:\n  " if len(problems) > 1 else ""
        raise UserError(head + "\n  ".join(problems))
    return LoadedRecipe(recipe, file, tree)


def _find(name: str, folder: Path, what: str) -> Path:
    """The file that `name` means seen from `folder`: as it stands, with `.yaml`, or a shipped recipe's name."""
    beside = folder / name
    candidates = [beside, beside.parent / f"{beside.name}.yaml"]
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        candidates += [shipped_folder() / name, shipped_folder() / f"{name}.yaml"]
    for candidate in candidates:
        try:
            if name and candidate.is_file():
                return candidate
        except OSError as error:  # a folder that may not be looked into, a name that is too long
            raise UserError(f"{what} {name[:100]!r}: {error.strerror}") from None
    near = {path.stem for path in beside.parent.glob("*.yaml")} | set(shipped_recipes())
    if beside.is_dir():
        inside = ", ".join(sorted(path.name for path in beside.glob("*.yaml"))) or "no recipe"
        raise UserError(f"{what} {name!r}: that is a folder; it holds {inside}")
    raise UserError(
        f"{what} {name!r}: no such file.{did_you_mean(Path(name).stem, near) or did_you_mean(name, near)} "
        f"afd ships {', '.join(shipped_recipes())}; a path to a YAML file works too."
    )


def _with_parents(file: Path, children: tuple[Path, ...], problems: list[str]) -> Value:
    """The file's tree over its parent's, over the parent's parent's ..."""
    chain = (*children, file.resolve())
    if file.resolve() in children:
        raise UserError("extends: goes round in a circle: " + " -> ".join(map(_display, chain)))
    tree = _read(file, problems)
    extends = tree.data.get("extends") if isinstance(tree.data, Mapping) else None
    if extends is None or extends.data is None:
        return _filled(tree, Recipe)
    if not isinstance(extends.data, str) or not extends.data:
        problems.append(f"{extends.place.label}: extends: expected the name of one recipe, got {plain(extends)!r}")
        return _without_extends(tree)
    parent = _find(extends.data, file.parent, f"{extends.place.label}: extends")
    return _filled(_merged(_with_parents(parent, chain, problems), _without_extends(tree)), Recipe)


def _without_extends(tree: Value) -> Value:
    assert isinstance(tree.data, Mapping)
    return Value({key: value for key, value in tree.data.items() if key != "extends"}, tree.place)


def _read(file: Path, problems: list[str]) -> Value:
    name = _display(file)
    with open(file, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: larger than {MAX_BYTES} bytes; that is no recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8") from None
    tree = parse_yaml(text, name, file.resolve().parent, problems)
    if not isinstance(tree.data, Mapping):
        got = (
            "it is empty" if tree.data is None else f"it is {'a list' if isinstance(tree.data, tuple) else 'one value'}"
        )
        raise UserError(f"{tree.place.label}: a recipe is a mapping (lines of `key: value`); {got}")
    return tree


def _display(file: Path) -> str:
    """Relative to here where the file lies below here, so that messages stay short and can be clicked."""
    full = file.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def _merged(parent: Value, child: Value) -> Value:
    """Deep merge; lists and scalars of the child win, and so does a section with another `name`."""
    if not (isinstance(parent.data, Mapping) and isinstance(child.data, Mapping)):
        return child
    tag = child_of(child, "name")
    if tag is not None and "name" in parent.data and plain(tag) != plain(parent.data["name"]):
        return child
    data = dict(parent.data)
    for key, value in child.data.items():
        data[key] = _merged(data[key], value) if key in data else value
    return Value(data, child.place)


def _with_set(tree: Value, text: str, problems: list[str]) -> Value:
    """The tree with one `key.path=value` applied; a mistake goes to `problems` and changes nothing."""
    path, equals, source = text.partition("=")
    keys = path.strip().split(".")
    place = Place("--set", Path.cwd())
    if not equals or not all(keys) or keys == ["extends"]:
        problems.append(f"--set {text}: expected KEY.PATH=VALUE, for example train.steps=100")
        return tree
    try:
        value = parse_yaml(source, "--set", place.folder, problems)
    except UserError as error:
        problems.append(f"{error}; put the value in quotes: --set '{path}=\"...\"'")
        return tree
    try:
        return _replaced(tree, keys, value, ())
    except UserError as error:
        problems.append(f"--set: {error}")
        return tree


def _replaced(tree: Value, keys: list[str], value: Value, done: tuple[str, ...]) -> Value:
    """`tree` with `value` merged in at `keys`; whole numbers index lists, missing sections are made."""
    if not keys:
        return value if isinstance(tree.data, tuple) else _merged(tree, value)
    key, *rest = keys
    here = (*done, key)
    if isinstance(tree.data, tuple):
        if not key.isdecimal() or int(key) >= len(tree.data):
            last = len(tree.data) - 1
            allowed = f"0 to {last}" if last >= 0 else "nothing: the list is empty"
            raise UserError(f"{dotted(here)}: no such entry of the list. Allowed: {allowed}")
        items = list(tree.data)
        items[int(key)] = _replaced(items[int(key)], rest, value, here)
        return Value(tuple(items), tree.place)
    inner = child_of(tree, key) or Value({} if rest else None, value.place)
    if rest and not isinstance(inner.data, Mapping | tuple):
        inner = Value({}, value.place)
    child = _replaced(inner, rest, value, here)
    if key == "name" and not rest:
        return _merged(tree, Value({"name": child}, value.place))
    assert isinstance(tree.data, Mapping)
    return Value({**tree.data, key: child}, tree.place)


def _absolute_prompts(tree: Value) -> Value:
    """Prompt files, relative to the file (or for `--set` the folder) that names them, as absolute paths."""
    prompts = child_of(tree, "prompts")
    if prompts is None or not isinstance(prompts.data, Mapping):
        return tree
    data = dict(prompts.data)
    for key in _BESIDE_THE_RECIPE:
        source = data.get(key)
        if source and isinstance(source.data, str) and source.data != "teacher" and "://" not in source.data:
            data[key] = Value(os.path.normpath(source.place.folder / source.data), source.place)
    assert isinstance(tree.data, Mapping)
    return Value({**tree.data, "prompts": Value(data, prompts.place)}, tree.place)


def _filled(tree: Value, model: type[BaseModel]) -> Value:
    """The tree with the `name` of every tagged section that relies on its default: `objective: {policy_mix: 0.2}`."""
    assert isinstance(tree.data, Mapping)
    fields = model.model_fields
    return Value(
        {key: _filled_field(value, fields[key]) if key in fields else value for key, value in tree.data.items()},
        tree.place,
    )


def _filled_field(value: Value, field: FieldInfo) -> Value:
    if isinstance(value.data, tuple):
        return Value(tuple(_filled_field(item, field) for item in value.data), value.place)
    if not isinstance(value.data, Mapping):
        return value
    section = section_class(field.annotation, value)
    if section is None and "name" not in value.data and isinstance(field.default, BaseModel):
        section = type(field.default)
        tag = Value(section.model_fields["name"].default, value.place)
        value = Value({"name": tag, **value.data}, value.place)
    return _filled(value, section) if section else value
