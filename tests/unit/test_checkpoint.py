"""Checkpoints: everything comes back bit for bit, damage is named, and nothing in them can run code."""

import ast
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afd_data.errors import UserError
from afd_data.files import file_sha256
from afd_train.checkpoint import (
    Parts,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    prune_checkpoints,
    save_checkpoint,
)
from afd_train.config import TrainConfig
from afd_train.parallel import Processes, open_accelerator

ROOT = Path(__file__).resolve().parents[2]
ONE = Processes(open_accelerator(), TrainConfig())  # process


def parts(width: int = 3, seed: int = 0) -> Parts:
    """Two networks, one of them with an optimiser."""
    torch.manual_seed(seed)
    net, frozen = nn.Linear(width, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.01, betas=(0.9, 0.99))
    return Parts({"student": dict(net.named_parameters()), "old": frozen.state_dict()}, {"student": optimizer})


def train(what: Parts, steps: int) -> None:
    """A few updates whose data follow from the step."""
    weights, optimizer = what.tensors["student"], what.optimizers["student"]
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        nn.functional.linear(x, weights["weight"], weights["bias"]).square().mean().backward()
        optimizer.step()


def weights(what: Parts) -> list[Tensor]:
    return [value.detach().clone() for tensors in what.tensors.values() for value in tensors.values()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint after three updates."""
    what = parts()
    train(what, 3)
    folder = tmp_path / "checkpoints" / "step-000003"
    save_checkpoint(folder, what, {"step": 3, "stream": {"drawn": 24}}, ONE)
    return folder


def test_networks_come_back_bit_for_bit(saved):
    trained, restored = parts(), parts(seed=1)
    train(trained, 3)
    load_checkpoint(saved, restored)
    assert all(torch.equal(a, b) for a, b in zip(weights(restored), weights(trained), strict=True))


def test_the_optimisers_state_comes_back_bit_for_bit(saved):
    trained, restored = parts(), parts(seed=1)
    train(trained, 3)
    load_checkpoint(saved, restored)
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
    load_checkpoint(saved, resumed)
    train(resumed, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))


def test_an_optimiser_that_has_not_stepped_can_be_kept(tmp_path):
    save_checkpoint(tmp_path / "step-000000", parts(), {"step": 0}, ONE)
    restored = parts(seed=1)
    train(restored, 2)  # so that there is something to forget
    load_checkpoint(tmp_path / "step-000000", restored)
    state = restored.optimizers["student"].state_dict()["state"]
    assert not any(value.any() for entry in state.values() for value in entry.values())


def test_keeping_an_optimiser_before_its_first_step_changes_none_of_its_steps(tmp_path):
    plain, kept, restored = parts(), parts(), parts(seed=1)
    save_checkpoint(tmp_path / "step-000000", kept, {"step": 0}, ONE)
    load_checkpoint(tmp_path / "step-000000", restored)
    for what in (plain, kept, restored):
        train(what, 5)
        assert all(torch.equal(a, b) for a, b in zip(weights(what), weights(plain), strict=True))


def test_the_state_of_an_optimiser_is_made_as_adamw_makes_it():
    made, own = parts(), parts()
    names = made.all()["student.optimizer"]
    own.optimizers["student"].zero_grad()
    train(own, 1)
    entries = own.optimizers["student"].state_dict()["state"]
    assert names.keys() == {f"{index}.{name}" for index, entry in entries.items() for name in entry}
    for index, entry in entries.items():
        for name, value in entry.items():
            found = names[f"{index}.{name}"]
            assert (found.shape, found.dtype, found.device) == (value.shape, value.dtype, value.device)


def test_tensors_are_restored_in_place(saved):
    restored = parts(seed=1)
    before = [value.data_ptr() for tensors in restored.all().values() for value in tensors.values()]
    load_checkpoint(saved, restored)
    assert [value.data_ptr() for tensors in restored.all().values() for value in tensors.values()] == before


def test_types_and_shapes_of_any_kind_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kept = {
        "half": torch.randn(2, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(0.1),
        "turned": torch.randn(3, 2, generator=generator).T,
        "none": torch.zeros(0, 4),
        "count": torch.tensor([1, 2]),
    }
    save_checkpoint(tmp_path / "step-000001", Parts({"net": kept}, {}), {"step": 1}, ONE)
    restored = {name: torch.zeros_like(value) for name, value in kept.items()}
    load_checkpoint(tmp_path / "step-000001", Parts({"net": restored}, {}))
    assert all(torch.equal(restored[name], value) for name, value in kept.items())


def test_the_state_is_returned_as_it_was_given(saved):
    state = load_checkpoint(saved, parts())
    assert (state["step"], state["stream"]) == (3, {"drawn": 24})


@pytest.mark.parametrize("name", ["student.safetensors", "old.safetensors", "student.optimizer.safetensors"])
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
        load_checkpoint(saved, restored)
    assert all(torch.equal(a, b) for a, b in zip(weights(restored), before, strict=True))


@pytest.mark.parametrize(
    "content", ["", '{"format": 3, "sha', "[]", "{}", '{"format": 3, "sha256": 3}', "\x00\xff", "[" * 10**5]
)
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
    (saved / "state.json").write_text(json.dumps(state | {"format": 6}))
    with pytest.raises(UserError, match="checkpoint format 6, this afd reads 5"):
        load_state(saved)


def test_networks_of_another_size_are_named(saved):
    with pytest.raises(UserError, match=r"student\.safetensors does not fit.*weight is missing, unknown or of another"):
        load_checkpoint(saved, parts(width=5))


@pytest.mark.parametrize("name", ["student", "student.optimizer"])
@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_tensor_that_is_missing_or_unknown_is_named(saved, name, change):
    tensors = load_file(saved / f"{name}.safetensors")
    odd = "another" if change == "unknown" else sorted(tensors)[0]
    if change == "unknown":
        tensors[odd] = torch.zeros(1)
    else:
        del tensors[odd]
    save_file(tensors, saved / f"{name}.safetensors")
    sign(saved)
    with pytest.raises(UserError, match=rf"{name}\.safetensors does not fit.*: {odd} is missing, unknown"):
        load_checkpoint(saved, parts())


def sign(folder: Path) -> None:
    """Write the sha256 of every file as it is now."""
    state = json.loads((folder / "state.json").read_text())
    digests = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
    (folder / "state.json").write_text(json.dumps(state | {"sha256": digests}))


def test_a_network_that_the_checkpoint_lacks_is_named(saved):
    wanted = parts()
    more = Parts({**wanted.tensors, "discriminator": {"weight": torch.zeros(1)}}, wanted.optimizers)
    with pytest.raises(UserError, match=r"discriminator\.safetensors"):
        load_checkpoint(saved, more)


def test_a_signed_file_that_is_no_safetensors_is_named(saved):
    (saved / "old.safetensors").write_bytes(b"\x80\x04N.")
    sign(saved)
    with pytest.raises(UserError, match=r"old\.safetensors: not a readable safetensors file"):
        load_checkpoint(saved, parts())


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_outside_the_folder_is_never_read(saved, tmp_path, absolute):
    secret = tmp_path / "secret"
    secret.write_text("x")
    hostile = {str(secret) if absolute else "../../secret": file_sha256(secret)}
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"sha256": hostile}))
    with pytest.raises(UserError, match=r"secret: missing, or its sha256"):
        load_state(saved)


def test_a_link_to_a_file_outside_the_folder_is_never_read(saved, tmp_path):
    (tmp_path / "secret").write_text("x")
    (saved / "link").symlink_to(tmp_path / "secret")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"sha256": {"link": file_sha256(tmp_path / "secret")}}))
    with pytest.raises(UserError, match=r"link: missing, or its sha256"):
        load_state(saved)


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 3000, "\ud800"], ids=["empty", "dot", "null", "long", "half"])
def test_a_name_that_no_file_can_have_is_an_error_like_any_other(saved, name):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"sha256": {name: "0"}}))
    with pytest.raises(UserError, match="missing, or its sha256"):
        load_state(saved)


def test_the_newest_complete_checkpoint_is_found(saved):
    shutil.copytree(saved, saved.with_name("step-000012"))
    shutil.copytree(saved, saved.with_name("step-000020.part"))
    assert latest_checkpoint(saved.parent) == saved.with_name("step-000012")
    assert latest_checkpoint(saved.parent / "nowhere") is None


def test_the_newest_is_the_one_of_most_steps_however_many_digits_they_have(saved):
    for name in ("step-999950", "step-1000000", "step-notes"):
        shutil.copytree(saved, saved.with_name(name))
    assert latest_checkpoint(saved.parent) == saved.with_name("step-1000000")


def test_pruning_keeps_the_newest(saved):
    for step in (6, 9):
        shutil.copytree(saved, saved.with_name(f"step-{step:06d}"))
    prune_checkpoints(saved.parent, keep=2)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-000006", "step-000009"]


def test_saving_again_replaces_what_an_interrupted_save_left(saved):
    part = saved.with_name(saved.name + ".part")
    part.mkdir()
    (part / "rubbish.safetensors").write_text("half a file")
    save_checkpoint(saved, parts(), {"step": 3}, ONE)
    assert not part.exists()
    assert sorted(path.name for path in saved.iterdir()) == sorted([*load_state(saved)["sha256"], "state.json"])


def test_numbers_of_the_state_survive_json_exactly(tmp_path):
    value = math.pi / 7
    save_checkpoint(tmp_path / "step-000001", parts(), {"step": 1, "alarms": {"means": {"x": value}}}, ONE)
    assert load_state(tmp_path / "step-000001")["alarms"]["means"]["x"] == value


def test_checkpoints_are_safetensors_and_json_only(saved):
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}


def calls(tree: ast.AST) -> dict[str, list[ast.Call]]:
    """What a module calls, by name as written."""
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def imported(tree: ast.AST) -> set[str]:
    """Top-level modules that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def attributes_of(tree: ast.AST, name: str) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name}


@pytest.mark.parametrize("package", ["afd_data", "afd_train", "cli"])
def test_nothing_of_ours_runs_what_a_stranger_pickled(package):
    """Shards and students come from strangers, and unpickling runs what they wrote."""
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = calls(tree)
        assert not found.keys() & {"eval", "exec", "np.load", "accelerator.save_state", "accelerator.load_state"}, path
        assert not imported(tree) & {"cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
        assert "pickle" not in imported(tree) or attributes_of(tree, "pickle") == {"UnpicklingError"}, path
        for call in found.get("torch.load", []):
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert settings["weights_only"] == "True", path


def test_pt_files_are_written_for_other_programs_only():
    sources = [path for package in ("afd_data", "afd_train", "cli") for path in (ROOT / package).rglob("*.py")]
    writers = [path.name for path in sources if "torch.save" in calls(ast.parse(path.read_text(encoding="utf-8")))]
    assert writers == ["export.py"]
