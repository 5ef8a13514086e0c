"""Checkpoints: everything comes back bit for bit, damage is named, and nothing in them can run code."""

import ast
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from afd_data.errors import UserError
from afd_train.checkpoint import (
    Parts,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    prune_checkpoints,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]


def parts(width: int = 3, seed: int = 0) -> Parts:
    """Two networks, one of them with an optimiser."""
    torch.manual_seed(seed)
    net, frozen = nn.Linear(width, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.01, betas=(0.9, 0.99))
    return Parts({"student": net, "reference": frozen}, {"student": optimizer})


def train(what: Parts, steps: int) -> None:
    """A few updates whose data follow from the step."""
    net, optimizer = what.modules["student"], what.optimizers["student"]
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def weights(what: Parts) -> list[torch.Tensor]:
    return [value.clone() for module in what.modules.values() for value in module.state_dict().values()]


def accept(state: dict) -> None:
    """No objection."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint after three updates."""
    what = parts()
    train(what, 3)
    folder = tmp_path / "checkpoints" / "step-000003"
    save_checkpoint(folder, what, {"step": 3, "stream": {"drawn": 24}})
    return folder


def test_networks_come_back_bit_for_bit(saved):
    trained, restored = parts(), parts(seed=1)
    train(trained, 3)
    load_checkpoint(saved, restored, accept)
    assert all(torch.equal(a, b) for a, b in zip(weights(restored), weights(trained), strict=True))


def test_the_optimisers_state_comes_back_bit_for_bit(saved):
    trained, restored = parts(), parts(seed=1)
    train(trained, 3)
    load_checkpoint(saved, restored, accept)
    wanted, found = (what.optimizers["student"].state_dict()["state"] for what in (trained, restored))
    assert found.keys() == wanted.keys() == {0, 1}
    for index, entries in wanted.items():
        assert entries.keys() == found[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(found[index][name], value) for name, value in entries.items())
        assert all(found[index][name].dtype == value.dtype for name, value in entries.items())


def test_going_on_from_a_checkpoint_equals_never_having_stopped(saved):
    unbroken, resumed = parts(), parts(seed=1)
    train(unbroken, 3)
    train(unbroken, 5)
    load_checkpoint(saved, resumed, accept)
    train(resumed, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))


def test_settings_of_the_optimiser_come_back(saved):
    restored = parts()
    restored.optimizers["student"].param_groups[0]["lr"] = 7.0
    load_checkpoint(saved, restored, accept)
    (group,) = restored.optimizers["student"].param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.1, 0.01, (0.9, 0.99))


def test_an_optimiser_that_has_not_stepped_can_be_kept(tmp_path):
    save_checkpoint(tmp_path / "step-000000", parts(), {"step": 0})
    restored = parts(seed=1)
    load_checkpoint(tmp_path / "step-000000", restored, accept)
    assert not restored.optimizers["student"].state


def test_the_state_is_returned_as_it_was_given(saved):
    state = load_checkpoint(saved, parts(), accept)
    assert (state["step"], state["stream"]) == (3, {"drawn": 24})


def test_an_objection_is_heard_before_anything_is_touched(saved):
    def object_to(state: dict) -> None:
        raise UserError(f"step {state['step']} is not mine")

    restored = parts(seed=1)
    before = weights(restored)
    with pytest.raises(UserError, match="step 3 is not mine"):
        load_checkpoint(saved, restored, object_to)
    assert all(torch.equal(a, b) for a, b in zip(weights(restored), before, strict=True))


@pytest.mark.parametrize("name", ["student.safetensors", "reference.safetensors", "student.optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(saved, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    match damage:
        case "flipped bit":
            path.write_bytes(content)
        case "truncated":
            path.write_bytes(content[:-9])
        case _:
            path.unlink()
    restored = parts(seed=1)
    before = weights(restored)
    with pytest.raises(UserError, match=rf"{name}: missing, or its sha256.*Delete .*step-000003"):
        load_checkpoint(saved, restored, accept)
    assert all(torch.equal(a, b) for a, b in zip(weights(restored), before, strict=True))


@pytest.mark.parametrize("content", ["", '{"format": 1, "sha', "[]", "{}", '{"format": 1, "sha256": 3}', "\x00\xff"])
def test_a_damaged_state_is_named(saved, content):
    (saved / "state.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"state\.json: not a checkpoint's state.*Delete"):
        load_state(saved)


def test_a_missing_state_is_named(saved):
    (saved / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json: not a checkpoint's state"):
        load_state(saved)


def test_a_later_format_is_refused(saved):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(UserError, match="checkpoint format 2, this afd reads 1"):
        load_state(saved)


def test_networks_of_another_size_are_named(saved):
    with pytest.raises(UserError, match=r"student\.safetensors does not fit.*size mismatch for weight"):
        load_checkpoint(saved, parts(width=5), accept)


def test_a_network_that_the_checkpoint_lacks_is_named(saved):
    wanted = parts()
    more = Parts({**wanted.modules, "discriminator": nn.Linear(1, 1)}, wanted.optimizers)
    with pytest.raises(UserError, match=r"discriminator\.safetensors"):
        load_checkpoint(saved, more, accept)


def test_a_file_outside_the_folder_is_never_read(saved, tmp_path):
    state = json.loads((saved / "state.json").read_text())
    (tmp_path / "secret").write_text("x")
    (saved / "state.json").write_text(json.dumps(state | {"sha256": {"../../secret": "0"}}))
    with pytest.raises(UserError, match=r"step-000003/secret: missing"):
        load_state(saved)


def test_the_newest_complete_checkpoint_is_found(saved):
    shutil.copytree(saved, saved.with_name("step-000012"))
    shutil.copytree(saved, saved.with_name("step-000020.part"))
    assert latest_checkpoint(saved.parent) == saved.with_name("step-000012")
    assert latest_checkpoint(saved.parent / "nowhere") is None


def test_pruning_keeps_the_newest(saved):
    for step in (6, 9):
        shutil.copytree(saved, saved.with_name(f"step-{step:06d}"))
    prune_checkpoints(saved.parent, keep=2)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-000006", "step-000009"]


def test_saving_again_replaces_what_an_interrupted_save_left(saved):
    part = saved.with_name(saved.name + ".part")
    part.mkdir()
    (part / "rubbish.safetensors").write_text("half a file")
    save_checkpoint(saved, parts(), {"step": 3})
    assert not part.exists()
    assert sorted(path.name for path in saved.iterdir()) == sorted([*load_state(saved)["sha256"], "state.json"])


def test_numbers_of_the_state_survive_json_exactly(tmp_path):
    value = math.pi / 7
    save_checkpoint(tmp_path / "step-000001", parts(), {"step": 1, "alarms": {"means": {"x": value}}})
    assert load_state(tmp_path / "step-000001")["alarms"]["means"]["x"] == value


def test_checkpoints_are_safetensors_and_json_only(saved):
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}


def called(tree: ast.AST) -> set[str]:
    """Names of what a module calls, as written."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imported(tree: ast.AST) -> set[str]:
    """Top-level modules that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ["afd_data", "afd_train", "cli"])
def test_nothing_of_ours_pickles_or_unpickles(package):
    """Shards and students come from strangers, and unpickling runs what they wrote."""
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {
            "torch.load",
            "torch.save",
            "eval",
            "exec",
            "np.load",
            "accelerator.save_state",
            "accelerator.load_state",
        }
        assert not called(tree) & calls, path
        assert not imported(tree) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
