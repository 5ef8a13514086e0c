"""What is known of a student -> the model card of its repository: `README.md` with a head that the Hub reads.

Everything comes in as data that may be published; texts of strangers (prompts, captions, names) are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from afd_data.card import hub_licence, spoken
from afd_train.config import Recipe, StudentConfig, TrainConfig
from afd_train.objective_config import ADVERSARIAL
from afd_train.public import without_machine
from afd_train.student_data import TeacherData
from afd_train.students.folder import StudentFile

TEMPLATE = "student_card.md.j2"
TAGS = ("text-to-video", "video-generation", "causal", "few-step", "distillation", "adversarial-flow-distillation")
COLUMNS = ("teacher", "base")  # and the student itself


@dataclass(frozen=True)
class Facts:
    """All that a card tells.  `results` is results.json, `samples` are (path in the repository, caption)."""

    repo: str
    address: str  # where the repository's files are served
    about: StudentFile
    megabytes: float
    licence: str | None
    recipe: Recipe | None = None
    policy: str = "ema"
    data: TeacherData | None = None
    results: Mapping[str, Any] | None = None
    samples: list[tuple[str, str]] = field(default_factory=list)
    has_log: bool = False
    adapter: bool = False


def model_card(facts: Facts) -> str:
    """The text of `README.md`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; the template escapes what strangers wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spoken"] = spoken
    body = environment.get_template(TEMPLATE).render(_context(facts))
    head = yaml.safe_dump(_head(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + re.sub(r"\n{3,}", "\n\n", body)


def base_model(student: StudentConfig) -> str | None:
    """OWNER/REPO of the released weights that a student started from."""
    match = re.match(r"hf://([\w.-]+/[\w.-]+?)(?:[@/]|$)", student.init or "")
    return match[1] if match else None


def _head(facts: Facts) -> dict[str, Any]:
    head: dict[str, Any] = {**hub_licence({facts.licence or "unknown"})}
    head |= {"library_name": "diffusers", "pipeline_tag": "text-to-video", "tags": list(TAGS)}
    if base := base_model(facts.about.student):
        head |= {"base_model": base, "base_model_relation": "finetune"}
    metrics = _metrics(facts)
    if metrics:
        teacher, split = _teacher_name(facts), facts.recipe.eval.split if facts.recipe else "test"
        dataset = {"type": "videos", "name": f"Videos of the teacher {teacher}", "split": split}
        results = {"task": {"type": "text-to-video"}, "dataset": dataset, "metrics": metrics}
        head["model-index"] = [{"name": facts.repo.split("/")[-1], "results": [results]}]
    return head


def _metrics(facts: Facts) -> list[dict[str, Any]]:
    """The student's means, for the Hub."""
    cells = [cell for cell in (facts.results or {}).get("cells", []) if cell["policy"] == facts.policy]
    return [
        {
            "type": cell["metric"],
            "name": cell["metric"].replace("_", " "),
            "value": round(cell["mean"], 6),
            "args": {"prompts": cell["n"], "interval_95": [cell["lo"], cell["hi"]]},
        }
        for cell in cells
    ]


def _context(facts: Facts) -> dict[str, Any]:
    from afd_train.evaluation.report import NAMES

    student = facts.about.student
    return {
        **{key: getattr(facts, key) for key in ("repo", "address", "recipe", "data", "samples", "has_log", "adapter")},
        "name": facts.repo.split("/")[-1],
        "steps": len(student.steps),
        "video": facts.about.video,
        "student": student,
        "megabytes": f"{facts.megabytes:.1f}",
        "start": _start(facts),
        "prompt": "a red ball falls and bounces" if _teacher_name(facts) == "playground" else "a cat walks over a roof",
        "policy": NAMES[facts.policy],
        "unit": (facts.results or {}).get("unit", "prompt"),
        "columns": [NAMES[policy] for policy in _columns(facts)],
        "table": _table(facts),
        "runs": _runs(facts.recipe) if facts.recipe else [],
        "licence_text": _licence(facts),
    }


def _start(facts: Facts) -> str:
    init = facts.about.student.init
    if init is None:
        return "random weights"
    base = base_model(facts.about.student)
    return f"`{init}`" if base is None else f"[{base}](https://huggingface.co/{base}) (`{init}`)"


def _teacher_name(facts: Facts) -> str:
    if facts.data:
        return facts.data.teachers[0].name
    return facts.recipe.teacher.name if facts.recipe else "unknown"


def _columns(facts: Facts) -> list[str]:
    there = {cell["policy"] for cell in (facts.results or {}).get("cells", [])}
    return [policy for policy in (*COLUMNS, facts.policy) if policy in there]


def _table(facts: Facts) -> list[list[str]]:
    """A row a metric: name, which way is better, a mean with its interval for every column, the difference."""
    from afd_train.evaluation.metric import Metric
    from afd_train.evaluation.report import plain, show, show_delta, show_p

    if facts.results is None:
        return []
    cells = {(cell["metric"], cell["policy"]): cell for cell in facts.results["cells"]}
    pairs = {(pair["metric"], pair["a"], pair["b"]): pair for pair in facts.results["comparisons"]}
    rows = []
    for name, record in facts.results["metrics"].items():
        metric, policies = Metric(**record), [cells.get((name, policy)) for policy in _columns(facts)]
        if not any(policies):
            continue
        values = [_with_interval(cell, "mean", lambda value, metric=metric: show(value, metric)) for cell in policies]
        pair = pairs.get((name, facts.policy, "base"))
        difference = _with_interval(pair, "delta", lambda value, metric=metric: show_delta(value, metric))
        rows.append([plain(name), metric.better, *values, difference + (f", p {show_p(pair['p'])}" if pair else "")])
    return rows


def _with_interval(record: Mapping[str, Any] | None, key: str, show: Callable[[float], str]) -> str:
    if record is None:
        return "-"
    interval = "" if record["lo"] is None else f" [{show(record['lo'])}, {show(record['hi'])}]"
    return show(record[key]) + interval


def _runs(recipe: Recipe) -> list[list[str]]:
    named = [*((f"pretrain.{index}", run) for index, run in enumerate(recipe.pretrain)), ("train", recipe.train)]
    return [[name, *_run(run)] for name, run in named]


def _run(run: TrainConfig) -> list[str]:
    rollouts = str(run.rollouts_per_prompt) if run.objective.name in ADVERSARIAL else "-"
    policy = f"adapters of rank {run.policy.rank}" if run.policy.name == "lora" else "all weights"
    return [run.objective.name, str(run.steps), str(run.prompts_per_step), rollouts, f"{run.learning_rate:g}", policy]


def _licence(facts: Facts) -> str:
    parts = [f"These weights: {spoken(facts.licence or 'not stated by whoever published them')}."]
    if base := base_model(facts.about.student):
        parts.append(f"They derive from [{base}](https://huggingface.co/{base}), whose licence applies as well.")
    if facts.data:
        licences = sorted({spoken(str(without_machine(teacher.licence))) for teacher in facts.data.teachers})
        parts.append(f"The videos that they learned from: {', '.join(licences)}.")
    return " ".join(parts)
