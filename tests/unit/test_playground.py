"""The playground: what prompts mean, that its mechanics are right, that pictures show its state, and what breaks."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from afd_data.config import VideoConfig
from afd_data.teacher_config import FlawsConfig, PlaygroundConfig, StyleConfig
from afd_data.teachers import RefusedError, Request, open_teacher
from afd_data.teachers.scene import BACKGROUND, BOUNCINESS, COLOURS, GRAVITIES, SIZES, parse
from afd_data.teachers.world import simulate
from afd_data.video import read_video

PROMPTS = Path(__file__).parents[2] / "recipes" / "prompts"
TINY = VideoConfig(lossless=True)
MEDIUM = SIZES["medium"]


def path_of(prompt: str, seed: int, flaws: FlawsConfig | None = None, body: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities [F, 2] of one body."""
    world = simulate(prompt, seed, TINY, flaws)[1]
    return np.array(world["bodies"][body]["positions"]), np.array(world["bodies"][body]["velocities"])


# What a prompt means.


@pytest.mark.parametrize(
    ("prompt", "bodies", "gravity", "wall"),
    [
        ("a ball", [("ball", None, None, None, None)], None, None),
        (
            "A small red ball that bounces well, in strong gravity",
            [("ball", "red", "small", "well", None)],
            "strong",
            None,
        ),
        ("Two tiny GREEN spheres are dropped!", [("ball", "green", "small", None, "dropped")] * 2, None, None),
        (
            "The violet disc does not bounce at all; gravity is weak",
            [("ball", "purple", None, "dead", None)],
            "weak",
            None,
        ),
        ("a ball, big and blue, not very bouncy", [("ball", "blue", "large", "hardly", None)], None, None),
        ("Weightless: one very bouncy crate", [("box", None, None, "very", None)], "none", None),
        (
            "A red ball is thrown to the left and a blue box slides to the right. The ball is springy.",
            [("ball", "red", None, "well", "thrown-left"), ("box", "blue", None, None, "rolled-right")],
            None,
            None,
        ),
        (
            "A white ball and a black ball, both very bouncy, are thrown up in normal gravity",
            [("ball", "white", None, "very", "thrown-up"), ("ball", "black", None, "very", "thrown-up")],
            "normal",
            None,
        ),
        ("A tall wall stands on the left, and a cube is let go", [("box", None, None, None, "dropped")], None, "left"),
        ("a ball between the walls", [("ball", None, None, None, None)], None, None),
        ("a photorealistic cinematic ball, 8k", [("ball", None, None, None, None)], None, None),
    ],
)
def test_a_prompt_fixes_what_it_mentions_and_nothing_else(prompt, bodies, gravity, wall):
    scene = parse(prompt)
    assert [(b.shape, b.colour, b.size, b.bounciness, b.launch) for b in scene.bodies] == bodies
    assert (scene.gravity, scene.wall) == (gravity, wall)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat walks", "balls and boxes"),
        ("", "balls and boxes"),
        ("four red balls", "at most 3"),
        ("wallpaper", "names neither"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_refused_with_the_reason(prompt, message):
    with pytest.raises(RefusedError, match=message):
        parse(prompt)


def test_the_one_ball_prompts_are_every_combination_of_four_attributes_once():
    lines = (PROMPTS / "playground-one-ball.txt").read_text().splitlines()
    scenes = [parse(line) for line in lines]
    assert all(len(scene.bodies) == 1 and scene.bodies[0].launch is None and not scene.wall for scene in scenes)
    seen = {(s.bodies[0].colour, s.bodies[0].size, s.gravity, s.bodies[0].bounciness) for s in scenes}
    six = ["red", "green", "blue", "yellow", "purple", "cyan"]
    assert len(lines) == 288
    assert seen == set(itertools.product(six, SIZES, GRAVITIES, BOUNCINESS))


@pytest.mark.parametrize("name", ["playground-one-ball.txt", "playground-mixed.txt"])
def test_no_two_shipped_prompts_count_as_near_duplicates(name):
    triples = []
    for line in (PROMPTS / name).read_text().splitlines():
        words = re.findall(r"\w+", line.lower())
        triples.append(set(zip(words, words[1:], words[2:], strict=False)))
    assert max(len(a & b) / len(a | b) for a, b in itertools.combinations(triples, 2)) < 0.8


def test_the_mixed_prompts_use_the_whole_vocabulary():
    scenes = [parse(line) for line in (PROMPTS / "playground-mixed.txt").read_text().splitlines()]
    bodies = [body for scene in scenes for body in scene.bodies]
    assert len(scenes) == 60
    assert {len(scene.bodies) for scene in scenes} == {1, 2, 3}
    assert {scene.gravity for scene in scenes} == set(GRAVITIES)
    assert {scene.wall for scene in scenes} == {None, "left", "middle", "right"}
    assert {body.colour for body in bodies} >= set(COLOURS)
    assert {body.bounciness for body in bodies} >= set(BOUNCINESS)
    assert {body.shape for body in bodies} == {"ball", "box"}


def test_colours_lie_at_least_25_degrees_apart_seen_from_the_background():
    directions = np.array([*COLOURS.values()], float) - BACKGROUND
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ directions.T - 2 * np.eye(len(directions))
    assert math.degrees(math.acos(cosines.max())) > 25


# Mechanics.


@pytest.mark.parametrize("gravity", ["weak", "normal", "strong"])
def test_a_dropped_ball_falls_by_half_g_t_squared(gravity):
    positions, _ = path_of(f"a medium ball is dropped in {gravity} gravity", seed=1)
    t = np.arange(4) / TINY.fps
    fallen = positions[0, 1] - GRAVITIES[gravity] * t**2 / 2
    # The solver's steps of 1/480 s shift the speed by g / 960: 0.07 units/s at most.
    np.testing.assert_allclose(positions[:4, 1], fallen, atol=0.03)


def test_without_gravity_a_ball_keeps_its_velocity_until_it_hits_something():
    positions, velocities = path_of("a small ball thrown to the right in zero gravity", seed=4)
    np.testing.assert_allclose(np.diff(positions[:4], axis=0), velocities[:3] / TINY.fps, atol=1e-4)
    np.testing.assert_allclose(velocities[:4], velocities[[0] * 4], atol=1e-9)


@pytest.mark.parametrize("word", ["hardly bouncy", "springy", "very bouncy"])
def test_the_speed_after_a_bounce_is_the_restitution_times_the_speed_before(word):
    prompt = f"a {word} medium ball is dropped in strong gravity"
    positions, velocities = path_of(prompt, seed=0)
    energy = velocities[:, 1] ** 2 / 2 + GRAVITIES["strong"] * (positions[:, 1] - MEDIUM)  # of the vertical motion
    first = int(np.argmax(velocities[:, 1] > 0))  # the first frame that rises
    wanted = BOUNCINESS[parse(prompt).bodies[0].bounciness or ""]
    assert math.sqrt(energy[first] / energy[0]) == pytest.approx(wanted, abs=0.01)


def test_energy_never_rises():
    for seed in range(40):
        positions, velocities = path_of("a small very bouncy ball in normal gravity", seed)
        energy = (velocities**2).sum(axis=1) / 2 + GRAVITIES["normal"] * positions[:, 1]
        assert np.diff(energy).max() < 0.01 * energy[0]


def test_bodies_stay_in_the_room_and_apart():
    room = 24
    for seed in range(20):
        _, world = simulate("a small red ball, a large blue ball and a green ball in strong gravity", seed, TINY)
        radii = [body["radius"] for body in world["bodies"]]
        positions = np.array([body["positions"] for body in world["bodies"]])
        for radius, path in zip(radii, positions, strict=True):
            assert path.min() > radius - 0.15
            assert path.max() < room - radius + 0.15
        for one, other in itertools.combinations(range(3), 2):
            distance = np.hypot(*(positions[one] - positions[other]).T)
            assert distance.min() > radii[one] + radii[other] - 0.3


def test_a_standing_wall_stops_what_rolls_against_it():
    for seed in range(8):
        positions, _ = path_of(
            "a wall stands in the middle and a small ball is rolled to the right, normal gravity", seed
        )
        assert positions[:, 0].max() < 11 - SIZES["small"] + 0.15  # the wall begins at 11 units


def test_the_rough_floor_sends_one_prompt_both_ways():
    sideways = [path_of("a very bouncy small ball is dropped in strong gravity", seed)[1][8, 0] for seed in range(24)]
    assert min(sideways) < -3
    assert max(sideways) > 3


# Pictures.


@pytest.mark.parametrize(("width", "height"), [(16, 16), (64, 64), (48, 32), (32, 96)])
@pytest.mark.parametrize("shape", ["ball", "box"])
def test_a_body_covers_its_area_at_its_place_at_any_resolution(shape, width, height):
    video = VideoConfig(width=width, height=height)
    frames, world = simulate(f"a white {shape} in normal gravity", 3, video)
    body, scale = world["bodies"][0], min(width, height) / world["units"]
    share = (frames[..., 0].astype(float) - BACKGROUND[0]) / (COLOURS["white"][0] - BACKGROUND[0])
    area = (math.pi if shape == "ball" else 4) * (body["radius"] * scale) ** 2
    np.testing.assert_allclose(share.sum(axis=(1, 2)), area, rtol=0.01)
    x = (share * (np.arange(width) + 0.5)).sum(axis=(1, 2)) / share.sum(axis=(1, 2))
    y = height - (share * (np.arange(height) + 0.5)[:, None]).sum(axis=(1, 2)) / share.sum(axis=(1, 2))
    np.testing.assert_allclose(np.stack([x, y], axis=1), np.array(body["positions"]) * scale, atol=0.06)


def test_a_hidden_body_leaves_the_plain_background():
    flaws = FlawsConfig(vanish=1.0)
    frames, world = simulate("a large red ball", 5, TINY, flaws)
    visible = np.array(world["bodies"][0]["visible"])
    assert 2 <= (~visible).sum() <= 5
    assert visible[0]
    assert (frames[~visible] == BACKGROUND).all()
    assert all((frame != BACKGROUND).any() for frame in frames[visible])


# Flaws.


def test_flaws_leave_the_start_as_it_was():
    exact, _ = path_of("a red ball in normal gravity", 7)
    flawed, _ = path_of("a red ball in normal gravity", 7, FlawsConfig(wrong_gravity=1.0, wrong_bounce=1.0, drag=1.0))
    np.testing.assert_array_equal(exact[0], flawed[0])
    assert np.abs(exact - flawed).max() > 0.5


def test_wrong_gravity_is_another_gravity():
    for seed in range(20):
        _, world = simulate("a ball in normal gravity", seed, TINY, FlawsConfig(wrong_gravity=1.0))
        assert abs(world["gravity"] / GRAVITIES["normal"] - 1) >= 0.24
        assert world["flaws"] == ["wrong_gravity"]


def test_a_share_of_flaws_is_the_share_of_videos():
    worlds = [simulate("a ball", seed, TINY, FlawsConfig(drag=0.25))[1] for seed in range(200)]
    assert 30 <= sum(world["flaws"] == ["drag"] for world in worlds) <= 70


def test_what_passes_through_the_floor_or_the_walls_leaves_the_picture():
    aside, below = 0, 0
    for seed in range(24):
        flaws = FlawsConfig(pass_through=1.0)
        positions, _ = path_of("a small ball is thrown to the right in strong gravity", seed, flaws)
        below += bool(positions[-1, 1] < 0)
        aside += bool(positions[-1, 0] > 24)
    assert below >= 6
    assert aside >= 4  # a bounce on the rough floor may turn a ball back before it gets there


def test_jitter_is_measured_in_radii():
    exact, _ = path_of("a large ball in zero gravity", 2)
    shaken, _ = path_of("a large ball in zero gravity", 2, FlawsConfig(jitter=0.1))
    assert (shaken - exact).std() == pytest.approx(0.1 * SIZES["large"], rel=0.4)


# The teacher.


def fetch(tmp_path: Path, name: str, seed: int) -> tuple[bytes, dict]:
    teacher = open_teacher(PlaygroundConfig())
    request = Request("f" * 8, "p", "A small red ball and a blue box in normal gravity", 0, seed, TINY)
    target = tmp_path / name
    delivery = teacher.fetch(teacher.submit(request), request, target)
    return target.read_bytes(), delivery.world


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = fetch(tmp_path, "a.mp4", 3), fetch(tmp_path, "b.mp4", 3), fetch(tmp_path, "c.mp4", 4)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_a_lossless_video_is_what_the_world_drew(tmp_path):
    data, _ = fetch(tmp_path, "a.mp4", 3)
    frames, _ = simulate("A small red ball and a blue box in normal gravity", 3, TINY)
    video = read_video(data)
    assert video.fps == TINY.fps
    np.testing.assert_array_equal(video.frames, frames)


def test_the_world_survives_json_with_floats_as_floats(tmp_path):
    _, world = fetch(tmp_path, "a.mp4", 3)
    back = json.loads(json.dumps(world, allow_nan=False))
    assert back == world
    for body in back["bodies"]:
        numbers = [*itertools.chain(*body["positions"], *body["velocities"]), body["radius"], body["restitution"]]
        assert all(type(number) is float for number in numbers)
        assert len(body["positions"]) == len(body["visible"]) == TINY.frames


def test_the_teacher_refuses_before_it_works():
    teacher = open_teacher(PlaygroundConfig())
    with pytest.raises(RefusedError, match="balls and boxes"):
        teacher.submit(Request("f", "p", "a sunset over the sea", 0, 0, TINY))


def test_flaws_are_part_of_the_identity():
    exact = open_teacher(PlaygroundConfig()).identity
    sloppy = open_teacher(PlaygroundConfig(flaws=FlawsConfig(drag=0.5))).identity
    assert exact.settings != sloppy.settings
    assert (exact.licence, exact.distillation, exact.paid) == ("CC0-1.0", "allowed", False)


def test_in_a_determined_world_the_seed_changes_nothing():
    prompt = "A small red ball is thrown to the left and bounces well, in normal gravity"
    first, second = (simulate(prompt, seed, TINY, determined=True)[0] for seed in (0, 1))
    assert np.array_equal(first, second)
    other = simulate(prompt.replace("left", "right"), 0, TINY, determined=True)[0]
    assert np.array_equal(other, first[:, :, ::-1])  # the room is its own mirror image


def test_a_determined_world_starts_in_the_middle_of_what_a_prompt_allows():
    _, world = simulate("a medium ball is dropped in normal gravity", 0, TINY, determined=True)
    # x between 3.1 and 20.9; y between 0.45 x 24 = 10.8 and 24 - 2.8 - 0.5 = 20.7.
    assert world["bodies"][0]["positions"][0] == [12.0, 15.75]
    assert world["bodies"][0]["velocities"][0] == [0.0, 0.0]


def test_flaws_are_drawn_from_the_seed_in_a_determined_world_too():
    prompt = "a red ball is dropped in normal gravity and bounces well"
    gravities = {
        simulate(prompt, seed, TINY, FlawsConfig(wrong_gravity=1.0), determined=True)[1]["gravity"] for seed in range(8)
    }
    assert len(gravities) > 2


def test_a_determined_world_refuses_a_crowd():
    with pytest.raises(RefusedError, match="holds one body, the prompt names 2"):
        simulate("a red ball and a blue ball", 0, TINY, determined=True)


def test_a_share_of_the_videos_has_flaws_and_the_others_are_exact():
    flaws = FlawsConfig(vanish=1.0, share=0.3)
    broken = [bool(simulate("a red ball", seed, TINY, flaws)[1]["flaws"]) for seed in range(300)]
    assert sum(broken) == pytest.approx(90, abs=24)  # three standard deviations of 300 x 0.3


def test_the_share_decides_which_videos_are_broken_and_not_how():
    some, all_of_them = FlawsConfig(wrong_gravity=1.0, share=0.5), FlawsConfig(wrong_gravity=1.0)
    for seed in range(20):
        world, wanted = (simulate("a red ball in weak gravity", seed, TINY, flaws)[1] for flaws in (some, all_of_them))
        assert world["gravity"] == (wanted["gravity"] if world["flaws"] else 15.0)


def test_a_style_changes_colours_and_no_motion():
    style = StyleConfig(tint=(0.5, 1.0, 1.0), dim=0.25)
    plain, world = simulate("a large white ball", 0, TINY)
    other, same = simulate("a large white ball", 0, TINY, style=style)
    assert world == same
    # A quarter of the way to the grey of 128, then half of the red.
    wanted = (plain + 0.25 * (128.0 - plain)) * np.array([0.5, 1.0, 1.0])
    assert np.abs(other - wanted).max() <= 0.5 + 1e-4
