"""Physics metrics on clips whose true values are known by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from afd_data.config import VideoConfig
from afd_data.teacher_config import FlawsConfig
from afd_data.teachers.drawing import draw
from afd_data.teachers.scene import BACKGROUND, COLOURS, SIZES, parse
from afd_data.teachers.world import simulate
from afd_train.evaluation.physics import METRICS, measure, track

PROMPTS = (Path(__file__).parents[2] / "recipes" / "prompts" / "playground-one-ball.txt").read_text().splitlines()
PROMPT = "A medium red ball that is very bouncy in normal gravity"  # g = 32, e = 0.92, r = 2.8
FPS = 8.0
TIMES = np.arange(12) / FPS
RADIUS = SIZES["medium"]


@dataclass
class Disc:
    """A ball to draw by hand."""

    rgb: tuple[int, int, int] = COLOURS["red"]
    radius: float = RADIUS
    shape: str = "ball"


def clip(*paths: np.ndarray, discs: list[Disc] | None = None, visible: np.ndarray | None = None, side=16) -> np.ndarray:
    """uint8 [F, side, side, 3] of discs that follow paths [F, 2] in units."""
    positions = np.stack(paths, axis=1)
    seen = np.ones(positions.shape[:2], bool) if visible is None else visible
    return draw(parse("a ball"), discs or [Disc() for _ in paths], positions, seen, side, side)


def flight(gravity: float, speed: float = 4.0, height: float = 19.0, start: float = 5.0) -> np.ndarray:
    """[12, 2]: thrown to the right from `start` at `height`; it meets nothing for the first frames."""
    return np.stack([start + speed * TIMES, height - gravity * TIMES**2 / 2], axis=1)


def bouncing(restitution: float, gravity: float = 32.0, drop: float = 9.0) -> np.ndarray:
    """[12, 2]: dropped `drop` units above the floor, the first bounce exact, a second one never reached in time."""
    landing = math.sqrt(2 * drop / gravity)
    up = restitution * gravity * landing
    after = TIMES - landing
    height = np.where(after < 0, drop - gravity * TIMES**2 / 2, up * after - gravity * after**2 / 2)
    return np.stack([np.full(12, 12.0), RADIUS + np.abs(height)], axis=1)


def score(video: np.ndarray, prompt: str = PROMPT) -> dict[str, float]:
    return measure(video, FPS, prompt)


def test_every_value_is_named_in_the_table_and_finite_for_any_pixels():
    rng = np.random.default_rng(0)
    videos = [
        np.full((12, 16, 16, 3), BACKGROUND[0], np.uint8),
        np.zeros((12, 16, 16, 3), np.uint8),
        rng.integers(0, 256, (12, 16, 16, 3), np.uint8),
        clip(flight(32.0)),
    ]
    for video in videos:
        for prompt in [PROMPT, "a ball", "two red balls and a box beside a wall"]:
            values = score(video, prompt)
            assert values.keys() == METRICS.keys()
            assert all(type(value) is float and math.isfinite(value) for value in values.values())


def test_an_empty_video_scores_worst():
    values = score(np.full((12, 16, 16, 3), BACKGROUND[0], np.uint8))
    worst = {
        "object_permanence": 0,
        "ghost_mass": 1,
        "gravity_error": 1,
        "parabola_residual": 2,
        "restitution_error": 1,
    }
    worst |= {"energy_rise": 1, "motion": 0, "jump": 1, "penetration": 1, "tracked": 0, "physics_ok": 0}
    assert {name: values[name] for name in worst} == worst


def test_the_teacher_passes_and_its_sloppy_copy_does_not():
    flaws = FlawsConfig(wrong_gravity=0.6, wrong_bounce=0.6, drag=0.4, jitter=0.02, pass_through=0.1, vanish=0.12)
    video = VideoConfig()
    exact, sloppy = [], []
    for seed, prompt in enumerate(PROMPTS[:48]):
        exact.append(score(simulate(prompt, seed, video)[0], prompt))
        sloppy.append(score(simulate(prompt, seed, video, flaws)[0], prompt))
    mean = {name: (np.mean([v[name] for v in exact]), np.mean([v[name] for v in sloppy])) for name in METRICS}
    assert mean["object_permanence"][0] >= 0.99
    assert mean["physics_ok"][0] >= 0.95
    assert mean["object_permanence"][1] < 0.97
    assert mean["physics_ok"][1] < 0.5
    assert mean["gravity_error"][0] < 0.03 < 0.2 < mean["gravity_error"][1]
    assert mean["restitution_error"][0] < 0.03 < mean["restitution_error"][1]


@pytest.mark.parametrize("side", [16, 32, 96])
def test_the_tracker_finds_a_ball_to_a_tenth_of_a_unit(side):
    path = flight(16.0)
    found = track(clip(path, side=side), parse(PROMPT))
    np.testing.assert_allclose(found.positions[0], path, atol=0.1)
    np.testing.assert_allclose(found.mass[0], 1.0, atol=0.05)


@pytest.mark.parametrize(("gravity", "error"), [(32.0, 0.0), (48.0, 0.5), (16.0, 0.5), (0.0, 1.0)])
def test_gravity_error_is_relative_to_the_prompt(gravity, error):
    frames = 7 if gravity == 48.0 else 8  # before it reaches the floor
    values = score(clip(flight(gravity)[:frames], visible=np.ones((frames, 1), bool)))
    assert values["gravity_error"] == pytest.approx(error, abs=0.03)
    assert values["parabola_residual"] < 0.05


def test_without_gravity_the_error_is_in_shares_of_the_weak_one():
    values = score(clip(flight(3.0)), "A medium red ball in zero gravity")
    assert values["gravity_error"] == pytest.approx(3.0 / 15.0, abs=0.02)


def test_a_path_that_is_no_parabola_leaves_a_residual():
    path = flight(16.0)
    path[:, 1] += np.where(np.arange(12) % 2, 0.6, -0.6)
    values = score(clip(path), "A medium red ball in weak gravity")
    assert values["parabola_residual"] == pytest.approx(0.6, abs=0.12)
    assert values["physics_ok"] == 0


@pytest.mark.parametrize("restitution", [0.5, 0.7, 0.92])
def test_restitution_error_is_the_difference_from_the_prompt(restitution):
    values = score(clip(bouncing(restitution)))
    assert values["restitution_error"] == pytest.approx(0.92 - restitution, abs=0.03)


def test_a_bounce_that_gives_energy_is_seen():
    values = score(clip(bouncing(1.25, drop=6.0)))
    # Kinetic energy at the floor grows by 1.25^2 = 1.56; nothing else changes.
    assert values["energy_rise"] == pytest.approx(0.5625, abs=0.1)
    assert score(clip(bouncing(0.9)))["energy_rise"] < 0.1


def test_a_frozen_video_moves_nothing_and_is_not_good_physics():
    values = score(np.repeat(clip(flight(32.0))[:1], 12, axis=0))
    assert values["motion"] == 0
    assert values["object_permanence"] == 1
    assert values["physics_ok"] == 0


def test_motion_is_the_speed_in_units_a_second():
    path = np.stack([5 + 8 * TIMES, np.full(12, 12.0)], axis=1)
    assert score(clip(path))["motion"] == pytest.approx(8.0, abs=0.2)


def test_three_missing_frames_of_twelve_leave_three_quarters_of_permanence():
    visible = np.ones((12, 1), bool)
    visible[4:7] = False
    values = score(clip(bouncing(0.92), visible=visible))
    assert values["object_permanence"] == 0.75
    assert values["tracked"] == 0


def test_a_teleport_is_a_jump():
    path = np.stack([5 + 4 * TIMES, np.full(12, 12.0)], axis=1)
    assert score(clip(path))["jump"] == 0
    path[6:, 0] += 6
    assert score(clip(path))["jump"] == 1


def test_a_second_ball_breaks_permanence_whatever_its_colour():
    here, there = flight(16.0), flight(16.0, start=14.0)
    for rgb in [COLOURS["red"], COLOURS["green"]]:
        values = score(clip(here, there, discs=[Disc(), Disc(rgb)]))
        assert values["object_permanence"] == 0
        assert values["ghost_mass"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("disc", [Disc(COLOURS["orange"]), Disc(radius=SIZES["small"]), Disc(radius=SIZES["large"])])
def test_the_wrong_colour_or_size_is_not_the_object_of_the_prompt(disc):
    assert score(clip(flight(16.0), discs=[disc]))["object_permanence"] == 0


def test_a_half_transparent_copy_is_a_third_of_the_mass():
    ball, copy = clip(flight(16.0)).astype(float), clip(flight(16.0, start=15.0)).astype(float)
    both = ball + (copy - BACKGROUND[0]) / 2
    values = score(both.round().astype(np.uint8))
    assert values["ghost_mass"] == pytest.approx(1 / 3, abs=0.03)


def test_faint_noise_does_not_make_objects():
    rng = np.random.default_rng(1)
    noisy = np.clip(clip(bouncing(0.92)) + rng.normal(0, 6, (12, 16, 16, 3)), 0, 255).astype(np.uint8)
    assert score(noisy)["object_permanence"] == 1


def test_overlapping_bodies_penetrate_and_touching_ones_do_not():
    prompt = "A medium red ball and a medium green ball in zero gravity"
    discs = [Disc(), Disc(COLOURS["green"])]
    one, other = np.full((12, 2), 10.0), np.full((12, 2), 10.0)
    other[:, 0] = 10 + 2 * RADIUS - 1.0
    overlapping = score(clip(one, other, discs=discs), prompt)["penetration"]
    other[:, 0] = 10 + 2 * RADIUS + 0.1
    touching = score(clip(one, other, discs=discs), prompt)["penetration"]
    # The common pixels belong to one of the two only, so that about half of the depth, 1.0 / RADIUS = 0.36, is seen.
    assert 0.1 < overlapping < 0.36
    assert touching < 0.02


def test_three_bodies_are_told_apart():
    prompt = "A small red ball, a large blue ball and a medium white box in weak gravity"
    for seed in range(6):
        frames, world = simulate(prompt, seed, VideoConfig())
        found = track(frames, parse(prompt))
        truth = np.array([body["positions"] for body in world["bodies"]])
        assert np.abs(found.positions - truth).max() < 0.35
        assert found.right.all()


def test_balls_that_look_alike_keep_their_names():
    left = np.stack([4 + 3 * TIMES, np.full(12, 16.0)], axis=1)
    right = np.stack([20 - 3 * TIMES, np.full(12, 8.0)], axis=1)
    found = track(clip(left, right), parse("Two medium red balls in zero gravity"))
    order = [0, 1] if found.positions[0, 0, 0] < 12 else [1, 0]
    np.testing.assert_allclose(found.positions[order], np.stack([left, right]), atol=0.15)


def test_what_the_prompt_leaves_open_is_not_held_against_a_video():
    for disc in [Disc(COLOURS["green"]), Disc(radius=SIZES["large"])]:
        assert score(clip(flight(15.0, height=18.0), discs=[disc]), "A ball falls")["object_permanence"] == 1
    assert score(clip(flight(15.0)), "A medium red ball")["gravity_error"] < 0.05
