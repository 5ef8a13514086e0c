"""What a study compares: worlds, teachers, and methods as changes to a world's recipe, each with its question.

A method's hyper-parameters stand here and in its world's recipe, chosen on validation prompts.  Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from afd_data.errors import UserError
from afd_train.config import Recipe
from afd_train.recipe import load_recipe
from afd_train.shipped import shipped_recipes

BASE, AFD = "base", "afd"
GROUP = "miniature"  # where the worlds' recipes are

# What a teacher changes; all students are measured against the exact one.
_SLOPPY = "wrong_gravity: 0.5, wrong_bounce: 0.5, drag: 0.3, jitter: 0.02, pass_through: 0.08, vanish: 0.12"
TEACHERS: Mapping[str, Mapping[str, str]] = {
    "exact": {},
    "styled": {"teacher.style": "{tint: [0.8, 0.9, 1.1], dim: 0.25}"},
    "bad-30": {"teacher.flaws": f"{{{_SLOPPY}, share: 0.3}}"},
}

_CHUNKS = {"discriminator.chunk_causal": "true", "discriminator.loss": "bt-chunk"}
_BRANCH = {
    "train.objective": "{name: afd-branch, old_policy_decay: 0.9, noise_spread: 0.5, inner_updates: 3, "
    "prior_weight: 0.01}",
    "train.prompts_per_step": "16",
    "discriminator.warmup_steps": "40",
    "discriminator.chunk_loss_weight": "2.0",
    **_CHUNKS,
}
_BRANCH_RATE = 5.0  # it judges a quarter as many clips a step
_SFT = {"train.objective": "{name: sft}", "train.prompts_per_step": "32"}
_BY_VIEW = {"discriminator.view": "luminance-differences"}


@dataclass(frozen=True)
class Method:
    """One way from the base to a student."""

    name: str
    question: str
    changes: Mapping[str, str] = field(default_factory=dict)  # recipe key -> YAML
    teacher: str = "exact"
    discriminator_rate: float = 1.0  # of the recipe's discriminator.learning_rate
    draws: str | None = None  # nothing is trained: this method's student is drawn, with `changes`


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(BASE, "where do all methods start? (seeds: noise of the videos)", draws=BASE),
        Method("sft", "is flow matching on the teacher's videos enough?", _SFT),
        Method(
            "sft-slow",
            "does it harm less at a twentieth of the learning rate?",
            {**_SFT, "train.learning_rate": "2.0e-5"},
        ),
        Method(
            "gan",
            "what does the discriminator's gradient do?",
            {"train.objective": "{name: gan}", "train.learning_rate": "2.0e-5"},  # 1e-4 collapses
        ),
        Method(
            "dmd",
            "what does matching a score that was fine-tuned on the teacher do?",
            {"train.objective": f"{{name: dmd, real: {GROUP}/flow}}", "train.learning_rate": "2.0e-4"},
        ),
        Method(AFD, "the world's recipe as it is: the paper's method (in `quickstart` branching)"),
        Method(
            "afd-branch",
            "are candidates of every chunk a better estimator than whole rollouts?",
            _BRANCH,
            discriminator_rate=_BRANCH_RATE,
        ),
        Method(
            "shuffled",
            "control: is it the advantages that teach?",
            {"train.objective.shuffled_advantages": "true"},
        ),
        Method(
            "branch-shuffled",
            "control: and in branching?",
            {**_BRANCH, "train.objective.shuffled_advantages": "true"},
            discriminator_rate=_BRANCH_RATE,
        ),
        Method("frozen-d", "must the discriminator follow the student?", discriminator_rate=0.0),
        Method("d-lr-0.2", "how fast may the discriminator follow? (afd: 1)", discriminator_rate=0.2),
        Method("d-lr-2", "how fast may the discriminator follow?", discriminator_rate=2.0),
        Method("d-lr-10", "how fast may the discriminator follow?", discriminator_rate=10.0),
        Method("logistic", "Bradley-Terry against a GAN's loss", {"discriminator.loss": "logistic"}),
        Method(
            "off-policy",
            "must rollouts be the current student's? (50 steps old)",
            {"train.objective.off_policy_steps": "50"},
        ),
        Method(
            "chunk-credit",
            "does a chunk learn more from its own score?",
            {"train.objective.credit": "chunk", **_CHUNKS},
        ),
        Method(
            "future-credit",
            "and from that of the chunks after it?",
            {"train.objective.credit": "future", **_CHUNKS},
        ),
        Method("sft-steps-1", "what SFT learns and one step cannot draw", {"student.steps": "[1000]"}, draws="sft"),
        Method("sft-steps-2", "the same in 2 steps", {"student.steps": "[1000, 318]"}, draws="sft"),
        Method("sft-steps-4", "the same in 4 steps", {"student.steps": "[1000, 750, 500, 250]"}, draws="sft"),
        Method(
            "sft-steps-16",
            "the same in 16 steps",
            {"student.steps": str([round(1000 * (16 - index) / 16) for index in range(16)])},
            draws="sft",
        ),
        Method("sft-style", "SFT on videos of another renderer", _SFT, teacher="styled"),
        Method("afd-style", "does AFD learn physics across renderers?", teacher="styled"),
        Method("afd-style-differences", "and with a discriminator that sees no style?", _BY_VIEW, teacher="styled"),
        Method("bad-teacher-30", "a third of the teacher's videos is sloppy", teacher="bad-30"),
        Method(
            "bad-teacher-30-confidence",
            "and bad videos teach less",
            {"discriminator.confidence": "1.0"},
            teacher="bad-30",
        ),
    )
}
SWEEP = {1: "sft-steps-1", 2: "sft-steps-2", 4: "sft-steps-4", 16: "sft-steps-16"}  # steps -> method
GROUPS: Mapping[str, Sequence[str]] = {
    "core": (BASE, "sft", "sft-slow", "gan", "dmd", AFD, "afd-branch", "shuffled", "branch-shuffled"),
    "sft-sweep": tuple(SWEEP.values()),
    "discriminator": ("frozen-d", "d-lr-0.2", "d-lr-2", "d-lr-10", "logistic"),
    "credit": ("chunk-credit", "future-credit"),
    "style": ("sft-style", "afd-style", "afd-style-differences"),
    "bad-teacher": tuple(name for name in METHODS if name.startswith("bad-teacher")),
    "all": tuple(METHODS),
}


def chosen(names: Sequence[str]) -> list[Method]:
    """The methods of these names and groups, with those whose students they draw, in the table's order.

    Raises UserError for an unknown name.
    """
    found: set[str] = set()
    for name in names:
        if name not in METHODS and name not in GROUPS:
            raise UserError(f"--methods {name}: unknown. Choose from {', '.join([*METHODS, *GROUPS])}.")
        found |= set(GROUPS.get(name, (name,)))
    found |= {METHODS[name].draws or name for name in found}
    return [method for method in METHODS.values() if method.name in found]


def recipe_of(world: str) -> str:
    """The recipe's name: `multimodal` is `miniature/multimodal`; other recipes and files stand for themselves."""
    return f"{GROUP}/{world}" if f"{GROUP}/{world}" in shipped_recipes() else world


def budget(minutes: float) -> dict[str, str]:
    """The same seconds for every method, and nothing beside the training."""
    never = "1000000"
    return {
        "train.clock": "cpu",
        "train.steps": never,
        "train.seconds": f"{60 * minutes:g}",
        "train.validate_every_steps": never,
        "train.validation_prompts": "1",
        "train.save_every_steps": "100",
        "train.keep_checkpoints": "1",
        "train.trackers": "[]",
        # A collapse is a finding: the run goes on to its end.
        "train.stop_margin": "1e9",
        "train.stop_reference_distance": "1e9",
    }


def settings_of(method: Method, world: str, minutes: float, own: Mapping[str, str]) -> dict[str, str]:
    """All changes to the world's recipe but the folders and the seed; `own`, from the command line, wins."""
    owner = METHODS[method.draws or method.name]
    changes = {**TEACHERS[owner.teacher], **owner.changes, **method.changes}
    if method.discriminator_rate != 1.0:
        rate = load_recipe(recipe_of(world), as_sets(own)).discriminator.learning_rate
        changes["discriminator.learning_rate"] = f"{rate * method.discriminator_rate:g}"
        own = {key: value for key, value in own.items() if key != "discriminator.learning_rate"}
    return budget(minutes) | changes | dict(own)


def resolved(world: str, settings: Mapping[str, str]) -> Recipe:
    """The recipe of a method.  Raises UserError."""
    return load_recipe(recipe_of(world), as_sets(settings))


def as_sets(settings: Mapping[str, str]) -> list[str]:
    """For --set."""
    return [f"{key}={value}" for key, value in settings.items()]
