"""Data flows one way: afd_data <- afd_train <- cli, without circles; config and command line stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"afd_data": "afd_data", "afd_train": "afd_train", "cli": "afd_cli"}
HEAVY = ("torch", "diffusers", "datasets", "transformers", "accelerate")
# Below: all that a recipe, a dry run and the command line may load.
TORCH_FREE = (
    "afd_data.config, afd_data.sample, afd_data.prompts, afd_data.plan, afd_data.journal, afd_data.teachers, "
    "afd_train.config, afd_train.presets, afd_train.memory, afd_train.recipe, afd_train.dry_run, afd_train.runs, "
    "afd_cli"
)


def module_files() -> dict[str, Path]:
    files = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


def imported(module: str, path: Path, tree: ast.AST) -> Iterator[str]:
    """Absolute names that the nodes below `tree` import."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            source = f"{base}{node.module or ''}".rstrip(".")
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> ast.Module:
    """The module without function bodies and `if TYPE_CHECKING:` blocks: what runs when it is imported."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            typing_only = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if typing_only else self.generic_visit(node)

    return Remover().visit(tree)


FILES = module_files()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("afd_data", ("afd_train", "afd_cli", "cli")), ("afd_train", ("afd_cli", "cli")), ("afd_cli", ("cli",))],
)
def test_nothing_imports_upward(package, forbidden):
    upward = [
        f"{module} imports {name}"
        for module, path in FILES.items()
        if module.split(".")[0] == package
        for name in imported(module, path, ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in forbidden
    ]
    assert upward == []


def test_modules_do_not_import_each_other_in_circles():
    graph = {
        module: {
            name
            for name in imported(module, path, at_import(ast.parse(path.read_text(encoding="utf-8"))))
            # A package's __init__ is run before its modules anyway; only imports between modules can go round.
            if name in FILES and name != module and not module.startswith(f"{name}.")
        }
        for module, path in FILES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["run", "quickstart", "--dry-run"]])
def test_help_and_dry_run_load_nothing_heavy(command, tmp_path):
    script = (
        f"import sys; from afd_cli import main; main({command!r}, standalone_mode=False); "
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_torch_free_modules_stay_so():
    script = f"import sys, {TORCH_FREE}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
