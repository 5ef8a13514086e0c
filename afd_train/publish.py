"""A student -> a model repository on the Hub: weights, description, recipe, metrics, samples and a card, in one commit.

A commit is there or not, so whatever interrupts a push leaves the repository as it was; pushing again sends what has
changed.  Neither a token nor a path of this machine is published; what the teacher's terms say is heeded before that.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from afd_data.errors import UserError
from afd_data.hub import checked_name
from afd_data.hub_repository import commit_files
from afd_train.config import Recipe
from afd_train.public import public_recipe, public_recipe_text, without_machine
from afd_train.runs import eval_folder, stream_folder, student_folder, train_folder
from afd_train.student_card import Facts, model_card
from afd_train.student_config import StudentConfig
from afd_train.student_data import TeacherData, read_teacher_data
from afd_train.students.folder import ABOUT, ADAPTER, TRANSFORMER, StudentFile, read_about

log = logging.getLogger(__name__)

Policy = Literal["student", "ema"]
Content = Path | bytes
CARD, RECIPE, RESULTS, METRICS, SAMPLES = (
    "README.md",
    "recipe.yaml",
    "eval/results.json",
    "train/metrics.jsonl",
    "samples",
)
SAMPLE_COUNT = 6
# What a push may have written: files of these names that are no longer part of it are taken away.
_OURS = tuple(f"{folder}/*.{kind}" for folder in (TRANSFORMER, ADAPTER) for kind in ("json", "safetensors"))
_MANAGED = (*_OURS, f"{SAMPLES}/*.mp4", RECIPE, RESULTS, METRICS)


@dataclass(frozen=True)
class Push:
    """What a push sends: path in the repository -> file or content; and the terms of the teacher's videos."""

    repo: str
    files: Mapping[str, Content]
    distillation: str  # allowed, disallowed or unknown

    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }

    @property
    def card(self) -> str:
        """The model card."""
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode()


def push_student(
    source: Path,
    repo: str,
    *,
    recipe: Recipe | None,
    licence: str | None = None,
    private: bool = False,
    policy: Policy = "ema",
    accept_unknown_terms: bool = False,
    message: str | None = None,
) -> str:
    """Publish the student folder `source` as the model repository `repo` (OWNER/NAME); returns its address.

    recipe: what trained it, for the card, the metrics and the samples; `policy` says which of its students this is.
    private: of a repository that is made now.  Raises UserError: no student, terms that forbid it (or are unknown and
    not accepted), no token, no rights, no network, a public repository where a private one was asked for.
    """
    with prepared(source, repo, recipe=recipe, licence=licence, policy=policy) as push:
        check_terms(push.distillation, accept_unknown_terms)
        return commit_files(push.repo, push.files, _MANAGED, private, message or "Student trained with afd")


@contextmanager
def prepared(
    source: Path, repo: str, *, recipe: Recipe | None, licence: str | None = None, policy: Policy = "ema"
) -> Iterator[Push]:
    """Collect what would be pushed, without asking the Hub anything.  The files last as long as the block.

    Raises UserError: a bad name, `source` is no student, or a file of the run cannot be read.
    """
    from huggingface_hub import constants

    repo = checked_name(repo.removeprefix("hf://"))
    about = read_about(source)
    with _self_contained(source) as folder:
        described = _public_about(folder / ABOUT)
        files: dict[str, Content] = {ABOUT: described, **_weights(folder, source)}
        public, data, results, samples = None, None, None, {}
        if recipe is not None:
            public, data = public_recipe(recipe), read_teacher_data(stream_folder(recipe))
            files[RECIPE] = public_recipe_text(recipe).encode()
            if (train_folder(recipe) / "metrics.jsonl").is_file():
                files[METRICS] = train_folder(recipe) / "metrics.jsonl"
            if results := _results(recipe, policy):
                files[RESULTS] = json.dumps(results, indent=1).encode()
                samples = _samples(recipe, policy)
        facts = Facts(
            repo=repo,
            address=f"{constants.ENDPOINT}/{repo}/resolve/main",
            about=StudentFile.model_validate_json(described),
            megabytes=sum(path.stat().st_size for path in (folder / TRANSFORMER).glob("*.safetensors")) / 1e6,
            licence=licence,
            recipe=public,
            policy=policy,
            data=data,
            results=results,
            samples=[(f"{SAMPLES}/{path.name}", caption) for path, caption in samples.items()],
            has_log=METRICS in files,
            adapter=about.base is not None,
        )
        files |= {f"{SAMPLES}/{path.name}": path for path in samples}
        files[CARD] = model_card(facts).encode()
        yield Push(repo, files, _distillation(data))


def check_terms(distillation: str, accept_unknown: bool) -> None:
    """Raises UserError where the terms of the teacher's videos forbid the publication, or do not say."""
    if distillation == "disallowed":
        raise UserError(
            "the terms of the teacher's videos do not allow distillation (`distillation: disallowed` in the cache), so "
            "this student is not published. Train on videos whose terms allow it."
        )
    if distillation == "unknown":
        if not accept_unknown:
            raise UserError(
                "whether the terms of the teacher's videos allow distillation is unknown. Read them; to publish "
                "nevertheless, on your own responsibility, pass --accept-unknown-terms."
            )
        log.warning("the terms of the teacher's videos are unknown; published as you said, and the card says so")


def _distillation(data: TeacherData | None) -> str:
    return data.distillation if data else "unknown"


@contextmanager
def _self_contained(source: Path) -> Iterator[Path]:
    """The student with its whole weights: itself, or for adapters a merged copy that lasts as long as the block."""
    if read_about(source).base is None:
        yield source
        return
    from afd_train.export import export_student

    with tempfile.TemporaryDirectory(prefix="afd-push-") as folder:
        merged = Path(folder) / "merged"
        export_student(source, merged, "merged")
        yield merged


def _weights(folder: Path, source: Path) -> dict[str, Content]:
    """The transformer of `folder` and the adapter of `source`; no other file of them is published."""
    if not (folder / TRANSFORMER / "config.json").is_file() or not list((folder / TRANSFORMER).glob("*.safetensors")):
        raise UserError(f"{folder}: no student here ({TRANSFORMER}/ has no config.json or no weights in safetensors)")
    return {
        path.relative_to(place).as_posix(): _public_json(path) if path.suffix == ".json" else path
        for place, pattern in [(folder, _OURS[0]), (folder, _OURS[1]), (source, _OURS[2]), (source, _OURS[3])]
        for path in sorted(place.glob(pattern))
    }


def _public_json(path: Path) -> bytes:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write the student again, for example with `afd export`") from None
    return json.dumps(without_machine(content), indent=1).encode()


def _public_about(path: Path) -> bytes:
    """student.json; where its autoencoder or text encoder was a folder of this machine it names the released one."""
    about = read_about(path.parent)
    student = about.student
    for key in ("autoencoder_path", "text_encoder_path"):
        if not getattr(student, key).startswith("hf://"):
            released = StudentConfig.model_fields[key].default
            log.warning(f"{ABOUT}: {key} {getattr(student, key)} is of this machine; published as {released}")
            student = student.model_copy(update={key: released})
    public = about.model_copy(update={"student": student}).model_dump_json()
    return json.dumps(without_machine(json.loads(public)), indent=1).encode()


def _results(recipe: Recipe, policy: Policy) -> dict | None:
    """results.json of this very student, without paths; None where there is none."""
    from afd_train.evaluation.clips import folder_sha256

    path = eval_folder(recipe) / "results.json"
    if not path.is_file():
        return None
    try:
        results = without_machine(json.loads(path.read_text(encoding="utf-8")))
        measured = results["header"].get(f"checkpoint {policy}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the results of an evaluation. Run `afd eval` again, or remove it.") from None
    if measured == folder_sha256(student_folder(recipe, policy)):
        return results
    log.warning(f"{path} does not measure the student as it is now: left out. Run `afd eval` again to publish it.")
    return None


def _samples(recipe: Recipe, policy: Policy) -> dict[Path, str]:
    """The first videos of an evaluation, one a prompt, with their prompts."""
    import pyarrow.parquet

    rows = eval_folder(recipe) / "metrics.parquet"
    table = pyarrow.parquet.read_table(rows, columns=["prompt_id", "prompt"]) if rows.is_file() else None
    prompts = {row["prompt_id"]: row["prompt"] for row in table.to_pylist()} if table else {}
    found: dict[str, Path] = {}
    for path in sorted((eval_folder(recipe) / "videos" / policy).glob("*.mp4")):
        found.setdefault(path.stem.rpartition("-")[0], path)  # a video is called PROMPT-TAKE
    chosen = list(found.items())[:SAMPLE_COUNT]
    return {path: " ".join(prompts.get(prompt, path.stem).split()) for prompt, path in chosen}
