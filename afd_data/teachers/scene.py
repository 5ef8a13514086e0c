"""Prompt -> Scene: what a sentence says about the playground's world, and nothing that it leaves open.

Reading is tolerant: unknown words are passed over, an attribute that is not mentioned stays None.  The world draws open
attributes from a seed; the physics metrics hold a video only to what its prompt fixes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from afd_data.teachers import RefusedError

UNITS = 24.0  # length of the video's short side
MAX_BODIES = 3
BACKGROUND = (128, 128, 128)  # mid grey: every colour below lies far from it, each in a direction of its own
WALL_COLOUR = (72, 72, 72)
COLOURS = {
    "red": (230, 45, 45),
    "green": (45, 200, 60),
    "blue": (45, 70, 235),
    "yellow": (240, 225, 45),
    "purple": (190, 50, 220),
    "cyan": (50, 215, 225),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
}
SIZES = {"small": 2.0, "medium": 2.8, "large": 3.8}  # radius in units; a box has the area of the disc
GRAVITIES = {"none": 0.0, "weak": 15.0, "normal": 32.0, "strong": 64.0}  # units / s^2, downwards
BOUNCINESS = {"dead": 0.15, "hardly": 0.45, "well": 0.7, "very": 0.92}  # restitution: speed after / speed before

Shape = Literal["ball", "box"]


@dataclass(frozen=True)
class Body:
    """One moving thing; None = the prompt does not say.  `launch`: dropped | thrown[-left|-right|-up|-down] |
    rolled[-left|-right]."""

    shape: Shape
    colour: str | None = None
    size: str | None = None
    bounciness: str | None = None
    launch: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt fixes.  `wall` is a wall that stands in the room; the picture's edges are always solid."""

    bodies: tuple[Body, ...]
    gravity: str | None = None
    wall: Literal["left", "middle", "right"] | None = None


@lru_cache(maxsize=4096)
def parse(prompt: str) -> Scene:
    """The scene that a prompt describes.  Raises RefusedError when it names no known object, or too many."""
    text = re.sub(r"[^a-z0-9.,;:!?]+", " ", prompt.lower())
    text, gravity = _first(text, _GRAVITY)
    text, wall = _wall(text)
    marks: list[_Mark] = []
    for kind, phrases in _PHRASES:
        text = _collect(text, kind, phrases, marks)
    marks.sort(key=lambda mark: mark.at)
    bodies = _bind(marks)
    if not bodies:
        raise RefusedError(
            f"the playground can draw balls and boxes, and the prompt names neither: {prompt!r}. "
            "Try `A small red ball that bounces well, in strong gravity`."
        )
    if len(bodies) > MAX_BODIES:
        raise RefusedError(
            f"the playground holds at most {MAX_BODIES} bodies, the prompt names {len(bodies)}: {prompt!r}"
        )
    return Scene(tuple(bodies), gravity, wall)


@dataclass(frozen=True)
class _Mark:
    """A word or phrase that means something.  `kind`: noun | article | all | colour | size | bounciness | launch."""

    at: int
    kind: str
    value: str


_WEAK = "weak|weakly|low|gentle|gently|feeble|feebly|faint|slight|reduced|little|lunar"
_STRONG = "strong|strongly|high|heavy|heavily|intense|powerful|fierce|fiercely|hard|crushing"
_NORMAL = "normal|normally|ordinary|usual|earthly|everyday|regular|average|medium"
_PULLS = r"gravity (?:is|pulls|feels|acts|stays|remains)(?: \w+)?"
_GRAVITY = {
    "none": r"(?:no|zero|without|without any|free of|absence of) gravity|weightless(?:ly|ness)?"
    r"|gravity is (?:absent|missing|off|switched off|turned off)",
    "weak": rf"(?:{_WEAK}) gravity|{_PULLS} (?:{_WEAK})|on the moon",
    "normal": rf"(?:{_NORMAL}) gravity|{_PULLS} (?:{_NORMAL})|on earth",
    "strong": rf"(?:{_STRONG}) gravity|{_PULLS} (?:{_STRONG})|on jupiter",
}
_BOUNCY = "(?:bouncy|springy|elastic)"
_BOUNCE = "bounc(?:e|es|ing)"
_NEVER = "(?:does not|do not|doesn t|don t|never|cannot|can t|not|refuses to|refuse to)"
_BOUNCINESS = {
    "dead": rf"dead|lifeless|limp|inelastic|{_NEVER} {_BOUNCE}(?: at all)?|(?:not|non|un) ?{_BOUNCY}(?: at all)?"
    rf"|without (?:any |a )?{_BOUNCE}|no {_BOUNCE}",
    "hardly": rf"(?:hardly|barely|scarcely|slightly|poorly|weakly|a little|not very)(?: \w+)? (?:{_BOUNCY}|{_BOUNCE})"
    rf"|(?:{_BOUNCY}|{_BOUNCE}) (?:hardly|poorly|badly|barely|weakly|only a little|a little|very little|little)",
    "well": rf"{_BOUNCE} (?:quite )?(?:well|nicely)|(?:fairly |quite |rather )?{_BOUNCY}",
    "very": rf"(?:very|super|extremely|highly|incredibly|wonderfully|most) {_BOUNCY}|rubber|superball"
    rf"|{_BOUNCE} (?:(?:very|extremely|incredibly) (?:well|high|strongly)|superbly|wildly)",
}
_THROWN = "(?:thrown|tossed|hurled|flung|shot|kicked|launched|pushed)"
_FLIES = "(?:thrown|tossed|hurled|flung|shot|kicked|launched|pushed|flies|flying|moves|moving)"
_ROLLED = "(?:rolls?|rolled|rolling|slides?|sliding)"
_LAUNCH = {
    "dropped": "drops|dropped|dropping|let go|let fall|released",
    "thrown-left": rf"{_FLIES}(?: \w+){{0,2}}? (?:(?:to|towards?) the left|leftwards?|left)",
    "thrown-right": rf"{_FLIES}(?: \w+){{0,2}}? (?:(?:to|towards?) the right|rightwards?|right)",
    "thrown-up": rf"{_FLIES}(?: \w+){{0,2}}? (?:up|upwards?|into the air)",
    "thrown-down": rf"{_FLIES}(?: \w+){{0,2}}? (?:down|downwards?|to the ground|to the floor|at the floor)",
    "thrown": _THROWN,
    "rolled-left": rf"{_ROLLED}(?: \w+){{0,2}}? (?:(?:to|towards?) the left|leftwards?|left)",
    "rolled-right": rf"{_ROLLED}(?: \w+){{0,2}}? (?:(?:to|towards?) the right|rightwards?|right)",
    "rolled": _ROLLED,
}
_COLOUR = {name: name for name in COLOURS} | {
    "purple": "purple|violet|magenta",
    "cyan": "cyan|turquoise|aqua",
    "red": "red|crimson|scarlet",
}
_SIZE = {
    "small": "small|tiny|little|mini",
    "medium": "medium(?: sized?)?|mid sized?|middle sized?|middling",
    "large": "large|big|huge|giant",
}
_NOUN = {"ball": "balls?|spheres?|dis[ck]s?|marbles?|orbs?", "box": "box|boxes|cubes?|crates?|blocks?|squares?"}
_ARTICLE = {
    "1": "a|an|one|another",
    "the": "the|this|that|these|its|which|it",
    "2": "two|2|a pair of",
    "3": "three|3",
    "4": "four|4|five|5|six|many|several",
}
_ALL = {"all": "both|all|they|each|everything|every one|are"}
_PHRASES = (
    ("bounciness", _BOUNCINESS),
    ("launch", _LAUNCH),
    ("colour", _COLOUR),
    ("size", _SIZE),
    ("noun", _NOUN),
    ("all", _ALL),
    ("article", _ARTICLE),
)


def _first(text: str, phrases: dict[str, str]) -> tuple[str, str | None]:
    """The text with the first matching phrase blanked, and that phrase's meaning."""
    marks: list[_Mark] = []
    text = _collect(text, "", phrases, marks)
    return text, min(marks, key=lambda mark: mark.at).value if marks else None


def _collect(text: str, kind: str, phrases: dict[str, str], marks: list[_Mark]) -> str:
    """Append a mark for every phrase found, earliest and then longest first; returns the text with them blanked."""
    while True:
        found = [
            (match.start(), -len(match.group()), value)
            for value, pattern in phrases.items()
            if (match := _longest(pattern, text))
        ]
        if not found:
            return text
        at, length, value = min(found)
        marks.append(_Mark(at, kind, value))
        # Blanks keep the other phrases' places; no pattern spans two of them.
        text = text[:at] + "_" * -length + text[at - length :]


def _longest(pattern: str, text: str) -> re.Match[str] | None:
    """The first match; of several alternatives that start there, the longest."""
    match = re.search(rf"\b(?:{pattern})\b", text)
    if match is None:
        return None
    ends = range(len(text), match.end() - 1, -1)
    return next(m for end in ends if (m := re.compile(rf"\b(?:{pattern})\b").fullmatch(text, match.start(), end)))


def _wall(text: str) -> tuple[str, Literal["left", "middle", "right"] | None]:
    """A wall that stands in the room ("a wall", "a tall grey wall"); "the walls" are the picture's edges."""
    match = re.search(r"\b(?:a|one)(?: \w+){0,2} wall\b([^.,;:!?]*)", text)
    if match is None:
        return re.sub(r"\bwalls?\b", "____", text), None
    tail = re.split(r"\b(?:and|while|as)\b", match.group(1))[0]
    place = re.search(r"\b(left|right|middle|centre|center)\b", tail)
    end = match.start(1) + (place.end() if place else 0)
    text = text[: match.start()] + "_" * (end - match.start()) + text[end:]
    word = place.group(1) if place else "middle"
    return text, "left" if word == "left" else "right" if word == "right" else "middle"


def _bind(marks: list[_Mark]) -> list[Body]:
    """Give every attribute to its noun: the next one if no article stands between, else the one before."""
    bodies: list[Body] = []
    holders: dict[int, list[int]] = {}  # place of a noun -> indices of its bodies
    for index, mark in enumerate(marks):
        if mark.kind == "noun":
            holders[index] = _referents(marks, index, bodies)
    for index, mark in enumerate(marks):
        if mark.kind in ("colour", "size", "bounciness", "launch"):
            for target in _targets(marks, index, holders, len(bodies)):
                if vars(bodies[target])[mark.kind] is None:
                    bodies[target] = replace(bodies[target], **{mark.kind: mark.value})
    return bodies


def _referents(marks: list[_Mark], noun: int, bodies: list[Body]) -> list[int]:
    """Indices of the bodies that a noun stands for; new ones are appended unless it says "the ball" of an old one."""
    shape: Shape = "ball" if marks[noun].value == "ball" else "box"
    article, colour = "1", None
    for mark in reversed(marks[:noun]):
        if mark.kind == "noun":
            break
        if mark.kind == "colour":
            colour = mark.value
        if mark.kind in ("article", "all"):
            article = mark.value
            break
    if article in ("the", "all"):
        known = [i for i, body in enumerate(bodies) if body.shape == shape]
        known = [i for i in known if colour is None or bodies[i].colour in (None, colour)] or known
        if known:
            return known if article == "all" else known[-1:]
    count = int(article) if article.isdigit() else 1
    bodies.extend(Body(shape, colour) for _ in range(count))
    return list(range(len(bodies) - count, len(bodies)))


def _targets(marks: list[_Mark], index: int, holders: dict[int, list[int]], count: int) -> list[int]:
    """Which bodies the attribute at `index` belongs to."""
    before = next((i for i in range(index, -1, -1) if marks[i].kind in ("noun", "all")), None)
    after = next((i for i in range(index, len(marks)) if marks[i].kind == "noun"), None)
    between = marks[index : after or index]
    if after is not None and (before is None or all(mark.kind not in ("article", "all") for mark in between)):
        return holders[after]
    if before is None:
        return []
    return list(range(count)) if marks[before].kind == "all" else holders[before]
