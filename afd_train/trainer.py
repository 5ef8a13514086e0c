"""The loop.  Read this first.

`train(recipe)` runs the phases of a recipe (`pretrain`, then `train`), each in a folder of its own and each starting
from the evaluation student of the one before.  The same command again resumes: everything of step n follows from
(seed, n) and the last checkpoint, so a resumed run equals an unbroken one, on a CPU bit for bit, its log included.

    TRAIN/metrics.jsonl, timings.jsonl, tensorboard/   what was measured, and how long it took
    TRAIN/checkpoints/step-NNNNNN/                     everything needed to go on
    TRAIN/students/{base,student,ema}/                 before, after, and the running average that is evaluated
    TRAIN/validation/step-NNNNNN.mp4                   the same held-out prompts and noise every time
    TRAIN/pretrain-N/...                               the same for a phase before
"""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.stream import Stream
from afd_train.alarms import Alarms
from afd_train.checkpoint import (
    Parts,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from afd_train.conditioning import CachedText, LatentCache
from afd_train.config import DiscriminatorConfig, LoraConfig, Recipe, TrainConfig
from afd_train.objectives import Metrics, Setup, open_objective, policies_of
from afd_train.parallel import Processes, open_accelerator, whole
from afd_train.policies import Policy, Trainee, lora_targets, plain_state
from afd_train.runlog import RunLog, Stopwatch
from afd_train.runs import stream_folder, train_folder
from afd_train.students.folder import save_adapter, save_student, starting_student
from afd_train.validation import Validation, prompts_of

log = logging.getLogger(__name__)

# What may change between a run and its resumption without changing what was trained so far.
FREE_TO_CHANGE = {
    "steps",
    "seconds",
    "save_every_steps",
    "keep_checkpoints",
    "trackers",
    "stop_margin",
    "stop_reference_distance",
    "shard",  # whether it was sharded is kept instead
}


def train(recipe: Recipe) -> Path:
    """Run or resume all phases; returns the folder of the last one.  Called by all processes of `accelerate launch`.

    Raises UserError: no cache, a checkpoint of another recipe, or a run that went wrong (with its diagnosis).
    """
    accelerator = open_accelerator()
    accelerator.wait_for_everyone()  # for the first process, which may be caching
    folder = train_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    lock = one_writer(folder / ".lock", str(folder)) if accelerator.is_main_process else nullcontext()
    with lock:
        start = recipe.student.init
        for index, config in enumerate(recipe.pretrain):
            phase = folder / f"pretrain-{index}"
            Trainer(recipe, config, phase, start).run()
            start = str(phase / "students" / "ema")
        Trainer(recipe, recipe.train, folder, start).run()
    return folder


class Trainer:
    """One phase."""

    def __init__(self, recipe: Recipe, config: TrainConfig, folder: Path, init: str | None):
        self.config = config
        self.folder = folder
        self.accelerator = open_accelerator(log_with=list(config.trackers) or None, project_dir=folder)
        self.processes = Processes(self.accelerator, config)
        _check_processes(config, recipe.discriminator, self.processes)
        self.student = starting_student(recipe.student, recipe.video, recipe.seed, init)
        self._identity = _identity(recipe, config) | {
            "starting weights": _digest(self.student.net),
            "train.shard": self.processes.sharded,
        }
        if not self.processes.sharded:  # a share of it goes to the GPU below, and no more
            self.student.net.to(self.processes.device)
        self.trainee = Trainee(self.student.net, config, self.processes, recipe.seed, policies_of(config.objective))
        cached_latents = recipe.student.autoencoder == "wan"
        self.stream = self._open_stream(recipe, "train", decode=not cached_latents)
        held_out = recipe.prompts.validation > 0
        self.held_out = self._open_stream(recipe, "validation", decode=not cached_latents) if held_out else None
        self.watch = Stopwatch()
        self.setup = Setup(
            student=self.student,
            trainee=self.trainee,
            config=config,
            discriminator=recipe.discriminator,
            stream=self.stream,
            held_out=self.held_out,
            seed=recipe.seed,
            processes=self.processes,
            watch=self.watch,
            teacher_latents=self._condition(recipe, cached_latents),
        )
        self.objective = open_objective(self.setup)
        self.validation = Validation(self.setup, folder / "validation", exact=recipe.teacher.name == "playground")
        self.alarms = Alarms(config)
        self._seconds = 0.0  # spent in training steps

    def run(self) -> None:
        """Go from the last checkpoint, or from nothing, to the last step."""
        step = self._resume()
        if step is not None and self._finished(step):
            log.info(f"{self.folder}: done, after {step} steps")
            return
        self.accelerator.init_trackers("tensorboard")
        self.runlog = RunLog(self.folder, self.accelerator, step, self.config.steps)
        try:
            if step is None:
                step = 0
                self._export("base", "student")
                self.objective.prepare(self._log)
                self._save(step)
            self._loop(step)
        finally:
            self.runlog.close()
            self.stream.close()
            if self.held_out:
                self.held_out.close()

    def _loop(self, first: int) -> None:
        config = self.config
        per_process = config.prompts_per_step // self.processes.count
        for step in range(first, config.steps):
            start = time.perf_counter()
            with self.watch("data"):
                examples = self.stream.next_batch(per_process)
            metrics = self.objective.step(examples, step)
            # Averaged, so that all processes stop, and sound the alarm, at the same step.
            metrics = self.processes.mean(metrics | {"seconds": time.perf_counter() - start})
            self._seconds += metrics.pop("seconds")
            done = step + 1
            last = self._finished(done)
            if done % config.validate_every_steps == 0 or last:
                metrics |= self.validation.run(done)
            self._log(step, metrics)
            self.alarms.check(step, metrics)
            if done % config.save_every_steps == 0 or last:
                self._save(done)
            if last:
                return

    def _finished(self, steps: int) -> bool:
        limit = self.config.seconds
        return steps >= self.config.steps or (limit is not None and self._seconds >= limit)

    def _log(self, step: int, metrics: Metrics) -> None:
        self.runlog.write(step, metrics, self.watch.read())

    def _parts(self) -> Parts:
        """What a checkpoint keeps; the same tensors that training moves."""
        own = self.objective.optimizers
        others = {
            name: own[name].exact(net) if name in own else net.state_dict()
            for name, net in self.objective.modules.items()
        }
        optimizers = {"student": self.trainee.optimizer, **own}
        return Parts({**self.trainee.state(), **others}, {name: each.adamw for name, each in optimizers.items()})

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "seconds": self._seconds,
            "stream": self.stream.state_dict(),
            "held_out": self.held_out.state_dict() if self.held_out else None,
            "alarms": self.alarms.state_dict(),
            "identity": self._identity,
        }
        # Students first: a finished run's checkpoint promises that they are there.
        self._export("student", "student")
        self._export("ema", "ema")
        checkpoints = self.folder / "checkpoints"
        save_checkpoint(checkpoints / f"step-{step:06d}", self._parts(), state, self.processes)
        if self.processes.main:
            prune_checkpoints(checkpoints, self.config.keep_checkpoints)

    def _export(self, name: str, acting: Policy) -> None:
        """Write a policy as a student folder; but for the base, an adapted one is an adapter beside it."""
        target = self.folder / "students" / name
        with self.trainee.acting(acting):  # the tensors below are live
            adapter = None if name == "base" else self.trainee.adapter_state()
            state = {}
            for key, value in (adapter or plain_state(self.student.net)).items():
                full = whole(value)  # all processes have a part in it
                if self.processes.main:
                    state[key] = full.cpu()
            if self.processes.main and adapter is None:
                save_student(self.student, target, state=state)
            elif self.processes.main:
                policy = self.config.policy
                assert isinstance(policy, LoraConfig)
                targets = list(lora_targets(policy))
                save_adapter(target, self.student, "../base", state, policy.rank, policy.alpha, targets)
        self.processes.wait()

    def _resume(self) -> int | None:
        """Restore the newest checkpoint; returns its step, None if there is none."""
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            return None
        state = load_checkpoint(checkpoint, self._parts(), check=self._check_identity)
        for optimizer in (self.trainee.optimizer, *self.objective.optimizers.values()):
            optimizer.synchronise()
        self.stream.load_state_dict(state["stream"])
        if self.held_out:
            self.held_out.load_state_dict(state["held_out"])
        self.alarms.load_state_dict(state["alarms"])
        self._seconds = state["seconds"]
        if state["step"] > self.config.steps:
            raise UserError(
                f"{checkpoint} is at step {state['step']}, beyond train.steps={self.config.steps}. "
                "Ask for more steps, or choose another `--set out=FOLDER`."
            )
        log.info(f"resuming from {checkpoint}")
        return state["step"]

    def _check_identity(self, state: dict) -> None:
        if changed := [key for key in self._identity if self._identity[key] != state["identity"].get(key)]:
            raise UserError(
                f"{self.folder}: holds a run of another recipe ({', '.join(changed)} differ). "
                "Put the settings back, or choose another `--set out=FOLDER`."
            )

    def _condition(self, recipe: Recipe, cached_latents: bool) -> LatentCache | None:
        """Encode prompts and the teacher's videos once, beside the shards; then no encoder stays in memory."""
        streams = [self.stream, *([self.held_out] if self.held_out else [])]
        folder, processes = stream_folder(recipe), self.processes
        self.student.text = text = CachedText(self.student.text, folder)
        prompts = (prompt for stream in streams for _, prompt in prompts_of(stream))
        text.fill(prompts, processes.index, processes.count)
        if not cached_latents:
            return None
        latents = LatentCache(folder, self.student.autoencoder, recipe.video, processes.device)
        for stream in streams:
            latents.fill(stream)
        return latents

    def _open_stream(self, recipe: Recipe, split: str, decode: bool) -> Stream:
        return Stream(
            stream_folder(recipe),
            recipe.stream,
            split,
            seed=recipe.seed,
            rank=self.processes.index,
            ranks=self.processes.count,
            video=recipe.video,
            decode=decode,
        )


def _check_processes(config: TrainConfig, discriminator: DiscriminatorConfig, processes: Processes) -> None:
    shared = {"train.prompts_per_step": config.prompts_per_step}
    if config.objective.name == "afd":
        shared |= {
            "train.held_out_per_step": config.held_out_per_step,
            "discriminator.warmup_prompts": discriminator.warmup_prompts,
        }
    for key, prompts in shared.items():
        if prompts % processes.count:
            raise UserError(
                f"{key}: {prompts} prompts cannot be split over {processes.count} processes; choose a multiple."
            )
    if config.policy.name == "full" and config.policy.offload and processes.sharded:
        raise UserError("train.policy.offload: copies of a sharded network are sharded already; set it to false")


def _digest(net: nn.Module) -> str:
    """sha256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _identity(recipe: Recipe, config: TrainConfig) -> dict:
    """What a checkpoint must have been trained with to be gone on from."""
    sections = {"student": recipe.student, "discriminator": recipe.discriminator, "video": recipe.video}
    identity = {name: section.model_dump(mode="json") for name, section in sections.items()}
    settings = config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    return (
        identity
        | {f"train.{key}": value for key, value in settings.items()}
        | {"seed": recipe.seed, "held out": recipe.prompts.validation > 0}
    )
