"""Distribution matching: which network learns from what, where the real score comes from, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd_data.errors import UserError
from afd_train.config import LoraConfig, TrainConfig
from afd_train.identity import identity_of
from afd_train.objective_config import DistilConfig, DmdConfig
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.dmd import DistributionMatching
from afd_train.parallel import check_processes
from afd_train.students import new_student
from afd_train.students.folder import save_student

PROMPTS = 3


def weights(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


def opened(setup: Setup) -> DistributionMatching:
    objective = open_objective(setup)
    assert isinstance(objective, DistributionMatching)
    return objective


@pytest.fixture
def folder_of(tiny_recipe, tmp_path):
    """`folder_of("a", seed=1, layers=2, frames=4)` -> a student folder."""

    def make(name: str, seed: int = 0, frames: int = 4, **student: Any) -> str:
        recipe = tiny_recipe(tmp_path, student=student)
        video = recipe.video.model_copy(update={"frames": frames})
        save_student(new_student(recipe.student, video, seed), tmp_path / name)
        return str(tmp_path / name)

    return make


def test_the_real_score_learns_the_teachers_videos_before_the_student_moves(setup_of):
    setup = setup_of(DmdConfig(real_steps=12, real_prompts=4, real_learning_rate=3e-3))
    objective, rows = opened(setup), []
    start = weights(setup.student.net)
    objective.prepare(lambda step, metrics: rows.append((step, metrics)))
    assert [step for step, _ in rows] == list(range(-12, 0))
    assert all(metrics.keys() == {"real/loss", "real/grad_norm"} for _, metrics in rows)
    losses = [metrics["real/loss"] for _, metrics in rows]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert not torch.equal(weights(objective.real), start)
    assert torch.equal(weights(objective.modules["fake"]), start)
    assert torch.equal(weights(setup.student.net), start)


def test_the_real_score_learns_the_same_in_parts(setup_of):
    found = []
    for clips_per_pass in (None, 2):
        setup = setup_of(DmdConfig(real_steps=1, real_prompts=5), clips_per_pass=clips_per_pass, max_grad_norm=1e9)
        rows = []
        opened(setup).prepare(lambda _, metrics, rows=rows: rows.append(metrics))
        found.append(rows[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_step_moves_student_and_fake_and_leaves_real(setup_of):
    setup = setup_of(DmdConfig(real_steps=1, real_prompts=2, fake_learning_rate=1e-3))
    objective = opened(setup)
    objective.prepare(lambda *_: None)
    before = [weights(net).clone() for net in (objective.real, objective.modules["fake"], setup.student.net)]
    metrics = objective.step(setup.stream.next_batch(PROMPTS), step=0)
    real, fake, student = (weights(net) for net in (objective.real, objective.modules["fake"], setup.student.net))
    assert torch.equal(real, before[0])
    assert not torch.equal(fake, before[1])
    assert not torch.equal(student, before[2])
    assert metrics.keys() == {"student/loss", "student/grad_norm", "fake/loss"}
    assert not any(parameter.requires_grad for parameter in objective.real.parameters())


def test_with_a_score_that_learned_nothing_it_is_distillation(setup_of):
    found = []
    for objective in (DistilConfig(), DmdConfig(real_steps=0)):
        setup = setup_of(objective)
        learning = open_objective(setup)
        learning.prepare(lambda *_: None)
        metrics = learning.step(setup.stream.next_batch(PROMPTS), step=0)
        found.append((metrics, weights(setup.student.net)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_checkpoints_keep_a_score_that_was_trained_and_none_that_can_be_made_again(setup_of):
    assert open_objective(setup_of(DmdConfig())).modules.keys() == {"real", "fake"}
    assert open_objective(setup_of(DistilConfig())).modules.keys() == {"fake"}


@pytest.mark.parametrize("make", [DistilConfig, lambda **s: DmdConfig(real_steps=0, **s)], ids=["distil", "dmd"])
def test_the_real_score_may_come_from_a_folder(setup_of, folder_of, make):
    def after_a_step(real: str | None) -> Tensor:
        setup = setup_of(make(real=real))
        open_objective(setup).step(setup.stream.next_batch(PROMPTS), step=0)
        return weights(setup.student.net)

    # Seed 0 is that of the starting student.
    assert torch.equal(after_a_step(folder_of("same", seed=0)), after_a_step(None))
    assert not torch.equal(after_a_step(folder_of("other", seed=1)), after_a_step(None))


def test_adapters_are_trained_towards_a_score_without_any(setup_of, folder_of):
    objective = DistilConfig(real=folder_of("real", seed=1))
    setup = setup_of(objective, policy=LoraConfig(rank=2, alpha=2.0), learning_rate=1e-2)
    before = weights(setup.student.net)
    metrics = open_objective(setup).step(setup.stream.next_batch(PROMPTS), step=0)
    assert metrics["student/grad_norm"] > 0
    assert not torch.equal(weights(setup.student.net), before)


def test_a_folder_is_found_from_where_afd_runs(setup_of, folder_of, tmp_path, monkeypatch):
    folder_of("real", seed=1)
    monkeypatch.chdir(tmp_path)
    absolute, relative = (opened(setup_of(DmdConfig(real=name))).real for name in (str(tmp_path / "real"), "real"))
    assert torch.equal(weights(absolute), weights(relative))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers": 2}, r"layers 2 \(here: 1\)"),
        ({"ffn_dim": 48}, r"ffn_dim 48 \(here: 32\)"),
        ({"pixel_scale": 3.0}, r"pixel_scale 3\.0 \(here: 5\.0\)"),
        ({"text_tokens": 7}, r"text_tokens 7 \(here: 6\)"),
        ({"frames": 6}, r"clips of latent size \(6, 48, 4, 4\) \(here: \(4, 48, 4, 4\)\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [DistilConfig, DmdConfig])
def test_a_score_of_another_kind_is_refused(setup_of, folder_of, make, settings, named):
    with pytest.raises(UserError, match=rf"train\.objective\.real: \S+ has {named}\. .* name a flow-matching student"):
        open_objective(setup_of(make(real=folder_of("odd", **settings))))


def test_a_shipped_student_is_named_without_its_folder(setup_of):
    with pytest.raises(UserError, match=r"train\.objective\.real: miniature/flow has dim 128 \(here: 24\)"):
        open_objective(setup_of(DmdConfig(real="miniature/flow")))


def test_a_folder_without_a_student_is_refused(setup_of, tmp_path):
    with pytest.raises(UserError, match="no student here"):
        open_objective(setup_of(DmdConfig(real=str(tmp_path))))


def test_a_run_is_known_by_the_weights_of_its_real_score(tiny_recipe, folder_of, tmp_path):
    def identity(real: str | None) -> dict[str, Any]:
        config = TrainConfig(objective=DmdConfig(real=real))
        recipe = tiny_recipe(tmp_path, train=config)
        net = new_student(recipe.student, recipe.video, recipe.seed).net
        return identity_of(recipe, config, net, sharded=False)

    first = identity(folder_of("real", seed=1))
    assert identity(str(tmp_path / "real")) == first
    folder = Path(folder_of("elsewhere", seed=2))
    (tmp_path / "real").rename(tmp_path / "away")
    folder.rename(tmp_path / "real")
    second = identity(str(tmp_path / "real"))
    assert [key for key in first if first[key] != second[key]] == ["real weights"]
    assert "real weights" not in identity(None)


def test_clips_of_the_real_score_are_dealt_to_the_processes(setup_of):
    setup = setup_of(DmdConfig(real_prompts=5))
    setup.processes.count = 2
    with pytest.raises(UserError, match=r"train\.objective\.real_prompts: 5 prompts cannot be split over 2 processes"):
        check_processes(setup.config, setup.discriminator, setup.processes)


def test_sharded_scores_are_refused(setup_of):
    setup = setup_of(DmdConfig())
    setup.processes.sharded = True
    with pytest.raises(UserError, match=r"train\.shard: dmd trains two networks and does not shard them"):
        open_objective(setup)
