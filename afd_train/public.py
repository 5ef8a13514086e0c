"""What may be published of a recipe and its records: the same values without the machine they come from.

An absolute path becomes its last component, and an address loses user, password and query.  Pure functions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from afd_train.config import Recipe
from afd_train.dry_run import recipe_text
from afd_train.recipe import LoadedRecipe
from afd_train.recipe_yaml import Place, Value

_PATH = re.compile(r"(?:~|/|\\\\|[A-Za-z]:[\\/]|file://|\.\.[\\/])")
# Inside a longer text a path has at least two components, so that a lone slash between words stays.
_PATH_INSIDE = re.compile(
    r"(?:(?<=[\s'\"=(,;\[{])|^)(?:~|/[^\s/'\"),;\]}]+|[A-Za-z]:)(?:[\\/][^\s\\/'\"),;\]}]+)+[\\/]?"
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)[?#][^\s'\"]*")


def without_machine(value: Any) -> Any:
    """A JSON value (dicts, lists and tuples, scalars) whose texts name neither folders of a machine nor logins."""
    if isinstance(value, dict):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine(item) for item in value]
    return _public_text(value) if isinstance(value, str) else value


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe with every path of the machine replaced by its last component."""
    return Recipe.model_validate_json(json.dumps(without_machine(recipe.model_dump(mode="json"))), strict=True)


def public_recipe_text(recipe: Recipe) -> str:
    """`public_recipe` as YAML that afd reads again."""
    nowhere = Value({}, Place("", Path()))
    return recipe_text(LoadedRecipe(public_recipe(recipe), Path("recipe.yaml"), nowhere)) + "\n"


def _public_text(text: str) -> str:
    if _PATH.match(text) and "\n" not in text:
        return _last(text)
    text = _PATH_INSIDE.sub(lambda found: _last(found[0]), text)
    return _QUERY.sub(r"\1", _LOGIN.sub("", text))


def _last(path: str) -> str:
    # The Windows class knows both kinds of slash.
    return PureWindowsPath(path.removeprefix("file://")).name
