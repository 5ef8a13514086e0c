"""A study: caches, trainings and measurements of some methods x seeds in one folder; what is finished is kept.

STUDY/teachers/NAME-DIGEST/    cache/: one for each teacher, shared by methods and seeds
STUDY/runs/METHOD-SEED/        settings.json, log.txt, train/ (of `afd train`), finished, SPLIT.json: its numbers
STUDY/SPLIT/                   results.json, table.md, plots.png, plots.svg
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.progress import progress_bar
from afd_train.config import Recipe
from tests.benchmarks.miniature import methods as table
from tests.benchmarks.miniature.budgets import budget_of
from tests.benchmarks.miniature.digests import DRAWN, TRAINED, VIDEOS, digest_of
from tests.benchmarks.miniature.measuring import Reference
from tests.benchmarks.miniature.methods import BASE, Method

FINISHED = "finished"  # an empty file, once a cache is complete or a student trained to the end


@dataclass(frozen=True)
class Plan:
    """What to do, as the command line says."""

    folder: Path
    world: str
    methods: Sequence[Method]
    seeds: Sequence[int]
    minutes: float
    split: str
    jobs: int
    changes: Mapping[str, str]

    @cached_property
    def settings(self) -> dict[str, dict[str, str]]:
        """Method -> all changes to the world's recipe."""
        return {
            method.name: table.settings_of(method, self.world, self.minutes, self.changes) for method in self.methods
        }

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Method -> recipe.  Raises UserError."""
        return {name: table.resolved(self.world, settings) for name, settings in self.settings.items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Method -> what its numbers depend on."""
        return {
            method.name: digest_of(self.recipes[method.name], DRAWN if method.draws == BASE else TRAINED)
            for method in self.methods
        }

    @property
    def runs(self) -> list[tuple[Method, int]]:
        """Seed by seed, so that a study that was stopped has whole seeds."""
        return [(method, seed) for seed in self.seeds for method in self.methods]

    def run_folder(self, method: Method, seed: int) -> Path:
        return self.folder / "runs" / f"{method.name}-{seed}"

    def teacher_settings(self, teacher: str) -> dict[str, str]:
        return {**table.TEACHERS[teacher], **self.changes}

    def teacher_folder(self, teacher: str) -> Path:
        recipe = table.resolved(self.world, self.teacher_settings(teacher))
        return self.folder / "teachers" / f"{teacher}-{digest_of(recipe, VIDEOS)[:8]}"

    def numbers(self, method: Method, seed: int) -> Path:
        """The file of a run's numbers."""
        return self.run_folder(method, seed) / f"{self.split}.json"


def claim(plan: Plan) -> None:
    """Write the settings of all runs into their folders.  Raises UserError where a folder has other ones."""
    for method, seed in plan.runs:
        path = plan.run_folder(method, seed) / "settings.json"
        settings = {"digest": plan.digests[method.name], "changes": plan.settings[method.name]}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "w") as file:
                json.dump(settings, file, indent=1)
            continue
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["digest"] != settings["digest"]:
            raise UserError(
                f"{path.parent}: holds a run with other settings{_difference(known['changes'], settings['changes'])}. "
                "Put them back, choose another --out, or remove the folder."
            )


def prepare(plan: Plan) -> None:
    """Cache the videos of all teachers; finished ones are kept."""
    for teacher in sorted({"exact", *(method.teacher for method in plan.methods)}):
        folder = plan.teacher_folder(teacher)
        if (folder / FINISHED).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if problem := _afd("cache-teacher", plan.world, folder, plan.teacher_settings(teacher)):
            raise UserError(f"cache-teacher: {problem}")
        (folder / FINISHED).touch()


def train(plan: Plan) -> list[str]:
    """Train what is not trained yet; returns what went wrong, a line a run."""
    missing = [run for run in plan.runs if run[0].draws is None and not _drawable(plan, *run)]
    minutes = len(missing) * plan.minutes / plan.jobs
    print(f"{len(missing)} trainings to go, about {minutes:.0f} min of {plan.jobs} at a time", file=sys.stderr)

    def one(method: Method, seed: int) -> str | None:
        cache = plan.teacher_folder(method.teacher) / "cache"
        settings = plan.settings[method.name] | {"seed": str(seed), "stream.folder": str(cache)}
        folder = plan.run_folder(method, seed)
        if problem := _afd("train", plan.world, folder, settings):
            return f"{method.name}, seed {seed}: {problem}"
        (folder / FINISHED).touch()
        return None

    return [found for found in together(plan.jobs, one, missing, "train") if found]


def measure(plan: Plan) -> None:
    """Measure what is trained and not measured yet, and the teacher."""
    import torch

    torch.set_num_threads(1)  # runs are measured side by side
    missing = [run for run in plan.runs if not plan.numbers(*run).exists() and _drawable(plan, *run)]
    teacher = teacher_numbers(plan)
    if not missing and teacher.exists():
        return
    recipe = next(iter(plan.recipes.values()))
    reference = Reference(plan.teacher_folder("exact") / "cache", recipe, plan.split)
    teacher.parent.mkdir(parents=True, exist_ok=True)
    _write(teacher, {"values": reference.teacher(), "prompts": len(reference.prompts)})

    def one(method: Method, seed: int) -> None:
        _write(plan.numbers(method, seed), _numbers(plan, reference, method, seed))

    together(plan.jobs, one, missing, "measure")


def teacher_numbers(plan: Plan) -> Path:
    return plan.folder / plan.split / "teacher.json"


def together(jobs: int, work: Callable, runs: Sequence[tuple[Method, int]], description: str) -> list:
    """`work` on every run, `jobs` at a time, with a bar; what is waiting is left out when one raises."""
    with ThreadPoolExecutor(jobs) as pool, progress_bar(len(runs), "run", description) as bar:
        futures = [pool.submit(work, *run) for run in runs]
        try:
            found = []
            for future in as_completed(futures):
                found.append(future.result())
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _numbers(plan: Plan, reference: Reference, method: Method, seed: int) -> dict:
    from afd_train.students.folder import open_student, starting_student

    recipe = plan.recipes[method.name]
    trained = _trained(plan, method, seed)
    if trained is None:
        student = starting_student(recipe.student, recipe.video, seed=0, init=recipe.student.init)
        student.net.eval()
    else:
        student = open_student(trained / "students" / "ema")
        student.sample_as(recipe.student)
    # The same noise for all methods of a seed: they are compared seed by seed.
    values = reference.measured(student, recipe.eval.seed + seed, recipe.eval.clips_per_prompt)
    spent = budget_of(trained, recipe.train) if trained is not None and method.draws is None else {}
    return {"values": values, "budget": spent}


def _trained(plan: Plan, method: Method, seed: int) -> Path | None:
    """TRAIN folder of the student that a method draws; None: the base."""
    owner = table.METHODS[method.draws or method.name]
    return None if owner.name == BASE else plan.run_folder(owner, seed) / "train"


def _drawable(plan: Plan, method: Method, seed: int) -> bool:
    """Whether its student is the base or has been trained to the end."""
    trained = _trained(plan, method, seed)
    return trained is None or (trained.parent / FINISHED).exists()


def _afd(command: str, world: str, folder: Path, settings: Mapping[str, str]) -> str | None:
    """Run `afd COMMAND` on one thread, its output in FOLDER/log.txt; returns the last line where it failed."""
    sets = [f"--set={text}" for text in table.as_sets({**settings, "out": str(folder)})]
    arguments = [sys.executable, "-m", "afd_cli", command, table.recipe_of(world), *sets]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        return (folder / "log.txt").read_text(encoding="utf-8").strip().rpartition("\n")[2]
    return None


def _write(path: Path, content: dict) -> None:
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)


def _difference(known: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    keys = sorted(key for key in known.keys() | wanted.keys() if known.get(key) != wanted.get(key))
    return f" ({', '.join(f'{key}: {known.get(key)}, now {wanted.get(key)}' for key in keys)})" if keys else ""
