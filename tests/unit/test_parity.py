"""The parity command: recordings of the original code pass, damaged ones do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_train.flow import clean_from_velocity, noised, schedule, table
from afd_train.student_config import StudentConfig
from afd_train.students import causal_net, new_transformer
from afd_train.students.keys import to_original
from afd_train.students.parity import compare, main
from afd_train.students.recording import read_recording
from tests.dense_wan import DenseWan, oracle_of, stirred

ORIGINAL = Path(__file__).parents[1] / "data" / "causal_wan"
FOUR, TWO, ONE = (1000, 750, 500, 250), (1000, 500), (1000,)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], Path]:
    """`damaged(change)` -> a copy of the original's recording whose tensors `change` has changed in place."""

    def make(change: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(ORIGINAL, folder)
        about = json.loads((folder / "config.json").read_text())
        del about["tensors"]
        (folder / "config.json").write_text(json.dumps(about))
        tensors = load_file(folder / "tensors.safetensors")
        change(tensors)
        save_file(tensors, folder / "tensors.safetensors")
        return folder

    return make


def failures(folder: Path) -> dict[str, str]:
    return {row.name: row.problem for row in compare(read_recording(folder)) if row.problem}


def test_the_originals_recording_is_reproduced(capsys):
    assert main([str(ORIGINAL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "25 tensors, 0 failed; tolerance 1e-05"
    names = {line.split()[0] for line in lines[1:-1]}
    assert names == set(load_file(ORIGINAL / "tensors.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "train.flow", "train.x0", "tf.flow", "tf_aug.flow", "cached.flow", "cached.clean_pass_flow", "cached.k_layer0",
        "cached.v_last", "rollout4.latents", "train_rollout.latents", "train_rollout.context_sigma",
        "scheduler.sigmas", "scheduler.train_weight",
    ],
)  # fmt: skip
def test_a_changed_output_fails(damaged, capsys, name):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] += 2e-5

    folder = damaged(change)
    assert list(failures(folder)) == [name]
    assert main([str(folder)]) == 1
    assert "FAILS: above 1e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("in.clean", "in.noisy"),
        ("in.noise", "in.noisy"),
        ("in.noisy", "in.noisy"),
        ("in.timestep", "tf.flow"),
        ("in.prompt_embeds", "tf.flow"),
        ("rollout4.steps", "rollout4.steps"),
        ("rollout4.injected", "rollout4.latents"),
        ("train_rollout.injected", "train_rollout.latents"),
        ("tf_aug.context", "tf_aug.flow"),
        ("scheduler.timesteps", "scheduler.timesteps"),
    ],
)
def test_a_changed_input_fails_where_it_is_used(damaged, name, fails):
    folder = damaged(lambda tensors: tensors[name].view(-1)[0].sub_(0.1))
    assert fails in failures(folder)


def test_prompts_without_their_padding_are_padded(damaged):
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["in.prompt_embeds"] = tensors["in.prompt_embeds"][:, :9].contiguous()  # the longest has 9 tokens

    assert failures(damaged(cut)) == {}


def test_steps_that_are_not_recorded_are_the_usual_ones(damaged):
    assert failures(damaged(lambda tensors: tensors.pop("rollout4.steps"))) == {}


def test_a_nan_fails_in_an_input_and_in_an_output(damaged):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["tf.flow"].view(-1)[0] = torch.nan
        tensors["train_rollout.injected"].view(-1)[-1] = torch.inf  # of a context that is never remembered

    assert failures(damaged(change)) == dict.fromkeys(("tf.flow", "train_rollout.injected"), "holds NaN or infinity")


@pytest.mark.parametrize("name", ["rollout4.extra", "dream.flow", "odd", "in.mask"])
def test_a_tensor_that_nobody_knows_fails(damaged, name):
    folder = damaged(lambda tensors: tensors.update({name: torch.zeros(3)}))
    assert failures(folder) == {name: "unknown"}
    assert main([str(folder)]) == 1


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("rollout4.latents", ["rollout4.injected", "rollout4.steps"]),
        ("tf_aug.context", ["tf_aug.flow", "tf_aug.timestep"]),
        ("train_rollout.latents", ["train_rollout.context_sigma", "train_rollout.injected"]),
    ],
)
def test_what_needs_a_missing_tensor_fails(damaged, name, fails):
    found = failures(damaged(lambda tensors: tensors.pop(name)))
    assert found == dict.fromkeys(fails, f"{name} is missing")


def test_missing_noise_fails(damaged):
    found = failures(damaged(lambda tensors: tensors.update({"rollout4.injected": tensors["rollout4.injected"][:5]})))
    assert set(found) == {"rollout4.injected", "rollout4.latents", "rollout4.steps"}
    assert found["rollout4.latents"] == "6 injected noises are needed, 5 are there"


def test_another_shape_fails(damaged):
    found = failures(damaged(lambda tensors: tensors.update({"tf.x0": tensors["tf.x0"][:, :3].contiguous()})))
    assert found == {"tf.x0": "has shape [2, 3, 16, 8, 12], computed: [2, 6, 16, 8, 12]"}


def test_inputs_that_do_not_fit_fail_without_a_traceback(damaged):
    found = failures(damaged(lambda tensors: tensors.update({"in.prompt_embeds": torch.zeros(2, 12, 7)})))
    assert found["tf.flow"].startswith("cannot be computed: ")


def test_a_tensor_that_config_json_promises_must_be_there(tmp_path):
    shutil.copytree(ORIGINAL, tmp_path / "copy")
    tensors = load_file(ORIGINAL / "tensors.safetensors")
    del tensors["cached.v_last"]
    save_file(tensors, tmp_path / "copy" / "tensors.safetensors")
    assert failures(tmp_path / "copy") == {"cached.v_last": "is not in tensors.safetensors"}


def spoilt(folder: Path, file: str, content: str | None) -> Path:
    shutil.copytree(ORIGINAL, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    return folder


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
@pytest.mark.parametrize("file", ["config.json", "tensors.safetensors", "weights.safetensors"])
def test_a_bad_folder_is_one_message(tmp_path, capsys, file, content):
    assert main([str(spoilt(tmp_path / "copy", file, content))]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert file in output.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "missing"),
        ({"dim": 96}, "another shape"),
        ({"dim": 50}, "rotary"),
        ({"dim": "wide"}, "dim"),
        ({"eps": 1e-5}, "eps is 1e-05"),
        ({"tensors": [1]}, "`tensors`"),
    ],
)
def test_sizes_that_do_not_fit_are_one_message(tmp_path, capsys, change, message):
    about = json.loads((ORIGINAL / "config.json").read_text()) | change
    assert main([str(spoilt(tmp_path / "copy", "config.json", json.dumps(about)))]) == 2
    assert message in capsys.readouterr().err


def test_no_folder_is_one_message(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "config.json is missing" in capsys.readouterr().err


# A second recording, made by the oracle: frame by frame, and every kind of rollout.


class Maker:
    """Records a random network of other sizes: 5 frames of 4 x 6 latent pixels, one at a time."""

    def __init__(self):
        self.config = StudentConfig(
            dim=60, heads=3, ffn_dim=80, layers=2, frequency_dim=32, text_dim=20, chunk_frames=1, autoencoder="wan"
        )
        torch.manual_seed(3)
        self.oracle = oracle_of(stirred(causal_net(new_transformer(self.config), self.config)))
        self.clean, self.noise = torch.randn(2, 2, 5, 16, 4, 6)
        self.text = torch.randn(2, 7, 20)
        self.timestep = (1000 * table(5.0)[torch.randint(1000, (2, 5))]).float()
        self.sigma = (self.timestep.double() / 1000).float()
        self.noisy = noised(self.clean, self.noise, self.sigma)
        self.tensors = {
            "in.prompt_embeds": self.text,
            "in.clean": self.clean,
            "in.noise": self.noise,
            "in.noisy": self.noisy,
            "in.timestep": self.timestep,
            "scheduler.sigmas": table(5.0),
            "scheduler.timesteps": 1000 * table(5.0),
        }

    def passes(self) -> None:
        """The groups without sampling."""
        t, zero = self.timestep.double() / 1000, torch.zeros(2, 5)
        aug = (1000 * table(5.0)[torch.randint(700, 1000, (2, 5))]).float()
        context = noised(self.clean, torch.randn_like(self.clean), aug / 1000)
        window = DenseWan(self.oracle.weights, 3, 1, window=3)
        seen: list[tuple[Tensor, Tensor]] = []
        clean_flow = self.oracle.noisy_context(self.clean, zero, self.text, seen)
        flows = {
            "train": self.oracle.noisy_context(self.noisy, t, self.text),
            "train_window": window.noisy_context(self.noisy, t, self.text),
            "tf": self.oracle.clean_context(self.noisy, t, self.text, self.clean, zero),
            "tf_aug": self.oracle.clean_context(self.noisy, t, self.text, context, aug.double() / 1000),
        }
        flows["cached"] = flows["tf"]
        for group, flow in flows.items():
            self.tensors[f"{group}.flow"] = flow
        for group in ("train", "tf"):
            self.tensors[f"{group}.x0"] = clean_from_velocity(self.noisy, flows[group], self.sigma)
        self.tensors |= {"tf_aug.context": context, "tf_aug.timestep": aug, "cached.clean_pass_flow": clean_flow}
        self.tensors |= {"cached.k_layer0": seen[0][0], "cached.v_last": seen[-1][1]}

    def rollout(
        self,
        group: str,
        steps: tuple[int, ...],
        first: tuple[int, ...] | None = None,
        window: tuple[int | None, int] = (None, 0),
        image: bool = False,
    ) -> None:
        """A group of sampling for videos."""
        starts = self.noise[:, 1:] if image else self.noise
        times = [schedule(first or steps, 5.0), *[schedule(steps, 5.0)] * (starts.shape[1] - 1)]
        injected = [torch.randn(2, 1, 16, 4, 6) for each in times for _ in each[1:]]
        oracle = DenseWan(self.oracle.weights, 3, 1, *window)
        noise = self._noise(starts, times, iter(injected))
        prefix = self.clean[:, :1] if image else None
        self.tensors[f"{group}.latents"] = oracle.rollout(self.text, noise, times, prefix)
        self.tensors[f"{group}.steps"] = 1000 * torch.tensor(schedule(steps, 5.0))
        if first is not None:
            self.tensors[f"{group}.steps_first_chunk"] = 1000 * torch.tensor(schedule(first, 5.0))
        if injected:
            self.tensors[f"{group}.injected"] = torch.stack(injected)

    def _noise(self, starts: Tensor, times: list[list[float]], injected: Iterator[Tensor]) -> Iterator[Tensor]:
        for start, steps in zip(starts.split(1, 1), times, strict=True):
            yield start
            yield from (next(injected) for _ in steps[1:])

    def train_rollout(self) -> None:
        """The first clip, whose contexts are noised again: of four noises a chunk, the last is for them."""
        times, injected = [schedule(FOUR, 5.0)] * 5, torch.randn(20, 1, 1, 16, 4, 6)
        steps = iter(injected.unflatten(0, (5, 4))[:, :3].flatten(0, 1))
        sigma = float(table(5.0)[-1])
        contexts = ((sigma, fresh) for fresh in injected[3::4])
        noise = self._noise(self.noise[:1], times, steps)
        latents = self.oracle.rollout(self.text[:1], noise, times, context_noise=contexts)
        self.tensors |= {"train_rollout.latents": latents, "train_rollout.injected": injected}
        self.tensors["train_rollout.context_sigma"] = torch.tensor([sigma])

    def save(self, folder: Path, **extra: object) -> Path:
        """Write the folder."""
        sizes = {"dim": 60, "num_heads": 3, "ffn_dim": 80, "num_layers": 2, "freq_dim": 32, "text_dim": 20}
        about = sizes | {"num_frame_per_block": 1, "scheduler_shift": 5.0} | extra
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(about))
        for file, state in (("tensors", self.tensors), ("weights", to_original(self.oracle.weights))):
            tensors = {name: value.detach().float().contiguous() for name, value in state.items()}
            save_file(tensors, folder / f"{file}.safetensors")
        return folder


@pytest.fixture(scope="module")
def maker() -> Maker:
    with torch.random.fork_rng(), torch.no_grad():
        maker = Maker()
        maker.passes()
        maker.rollout("rollout4", FOUR)
        maker.rollout("rollout2", TWO)
        maker.rollout("rollout1", ONE)
        maker.rollout("rollout_first4_then1", ONE, FOUR)
        maker.rollout("rollout_first4_then2", TWO, FOUR)
        maker.rollout("rollout_i2v", TWO, image=True)
        maker.rollout("rollout_window", TWO, window=(3, 1))
        maker.train_rollout()
    return maker


def test_a_second_recording_with_every_group_is_reproduced(maker, tmp_path):
    rows = compare(read_recording(maker.save(tmp_path / "second")))
    assert {row.name: row.problem for row in rows if row.problem} == {}
    assert {row.name for row in rows} == set(maker.tensors)


def test_image_to_video_may_be_recorded_without_its_image(maker, tmp_path):
    folder = maker.save(tmp_path / "second")
    tensors = load_file(folder / "tensors.safetensors")
    tensors["rollout_i2v.latents"] = tensors["rollout_i2v.latents"][:, 1:].contiguous()
    save_file(tensors, folder / "tensors.safetensors")
    assert failures(folder) == {}


def test_one_step_may_be_recorded_with_an_empty_list_of_noises(maker, tmp_path):
    folder = maker.save(tmp_path / "second")
    tensors = load_file(folder / "tensors.safetensors")
    save_file(tensors | {"rollout1.injected": torch.zeros(0, 2, 1, 16, 4, 6)}, folder / "tensors.safetensors")
    assert failures(folder) == {}


def test_config_json_may_say_how_long_the_window_is(maker, tmp_path):
    folder = maker.save(tmp_path / "same", windowed={"local_attn_size": 3, "sink_size": 1}, local_attn_size=-1)
    assert failures(folder) == {}
    folder = maker.save(tmp_path / "other", local_attn_size=2, sink_size=1)
    assert set(failures(folder)) == {"rollout_window.latents", "train_window.flow"}


def test_steps_that_are_not_on_the_schedule_fail(maker, tmp_path):
    folder = maker.save(tmp_path / "second")
    tensors = load_file(folder / "tensors.safetensors")
    tensors["rollout2.steps"] = torch.tensor([1000.0, 500.0])  # not warped: a step of 166.7
    save_file(tensors, folder / "tensors.safetensors")
    assert set(failures(folder)) == {"rollout2.steps", "rollout2.latents"}
