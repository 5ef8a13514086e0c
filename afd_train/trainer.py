"""The loop.  Read this first.

`train(recipe)` runs the phases of a recipe (`pretrain`, then `train`), each in a folder of its own and each starting
from the evaluation student of the one before.  The same command again resumes: everything of step n follows from
(seed, n) and the last checkpoint, so a resumed run equals an unbroken one, on a CPU bit for bit, its log included.

    TRAIN/metrics.jsonl, timings.jsonl, tensorboard/   what was measured, and how long it took
    TRAIN/checkpoints/step-NNNNNN/                     everything needed to go on
    TRAIN/margins.parquet                              how far the student is behind the teacher on each prompt
    TRAIN/students/{base,student,ema}/                 before, after, and the running average that is evaluated
    TRAIN/students/best/                               the average that did best in validation, where it is measured
    TRAIN/validation/step-NNNNNN.mp4                   the same held-out prompts and noise every time
    TRAIN/diagnosis.json                               why alarms ended the run, where they were to (train.on_alarm)
    TRAIN/pretrain-N/...                               the same for a phase before
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.margins import MARGINS
from afd_train.alarms import Alarms, DivergedError
from afd_train.batch import check_prompts, next_examples
from afd_train.best import Best, measured_metric
from afd_train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_state,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    saved_states,
)
from afd_train.config import Recipe, TrainConfig
from afd_train.ending import end_with_best, ended
from afd_train.exported import Students
from afd_train.feed import Feed
from afd_train.identity import check_identity, identity_of
from afd_train.objective_config import policies_of
from afd_train.objectives import Metrics, Setup, open_objective
from afd_train.objectives.judged import judge_of
from afd_train.parallel import Processes, check_processes, open_accelerator
from afd_train.policies import Policy, Trainee
from afd_train.run_state import RunState
from afd_train.runlog import RunLog, Stopwatch, clock_of
from afd_train.runs import train_folder
from afd_train.students.folder import starting_student
from afd_train.validation import Validation

log = logging.getLogger(__name__)


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
        check_processes(config, recipe.discriminator, self.processes)
        self._recipe = recipe
        self.student = starting_student(recipe.student, recipe.video, recipe.seed, init)
        self._identity = identity_of(recipe, config, self.student.net, self.processes.sharded)
        self._checkpoint = latest_checkpoint(folder / "checkpoints")
        self._clock = clock_of(config.clock)
        self._seconds = 0.0  # spent in training steps, and in preparing for them

    def run(self) -> None:
        """Go from the last checkpoint, or from nothing, to the last step."""
        recorded = self._recorded()
        if recorded and self._finished(recorded["step"]):
            log.info(f"{self.folder}: done, after {recorded['step']} steps")
            return
        if ended(self.folder, begun=recorded is not None):
            return
        self._place()
        kept = [state["data"] for state in saved_states(self.folder / "checkpoints")]
        self.feed = Feed(self._recipe, self.folder, self.student, self.processes, kept)
        done = False
        try:
            self._open()
            self._train(self._resume())
            done = True
        finally:
            self.feed.close(done)

    def _recorded(self) -> dict | None:
        """The state in the newest checkpoint; all of it is checked where there is nothing to go on with."""
        if self._checkpoint is None:
            return None
        state = read_state(self._checkpoint)
        check_identity(self.folder, self._identity, state["identity"])
        self._seconds = state["seconds"]
        if state["step"] > self.config.steps:
            raise UserError(
                f"{self._checkpoint} is at step {state['step']}, beyond train.steps={self.config.steps}. "
                "Ask for more steps, or choose another `--set out=FOLDER`."
            )
        return load_state(self._checkpoint) if self._finished(state["step"]) else state

    def _place(self) -> None:
        """The student, where it is trained."""
        config, net = self.config, self.student.net
        if not self.processes.sharded:  # a share of it goes to the GPU below, and no more
            net.to(self.processes.device)
        metric = measured_metric(self._recipe, config)
        kept: tuple[Policy, ...] = ("best",) if metric else ()
        policies = (*policies_of(config.objective), *kept)
        self.trainee = Trainee(net, config, self.processes, self._recipe.seed, policies)
        self.best = Best(self.trainee, metric)
        self.students = Students(self.folder / "students", self.student, self.trainee, config, self.processes)

    def _open(self) -> None:
        """Everything else that a step needs."""
        recipe, config = self._recipe, self.config
        self.watch = Stopwatch()
        self.setup = Setup(
            student=self.student,
            trainee=self.trainee,
            config=config,
            discriminator=recipe.discriminator,
            stream=self.feed.stream,
            held_out=self.feed.held_out,
            seed=recipe.seed,
            processes=self.processes,
            watch=self.watch,
            teacher_latents=self.feed.latents,
        )
        check_prompts(self.setup)
        self.objective = open_objective(self.setup)
        exact = recipe.teacher.name == "playground"
        self.validation = Validation(self.setup, self.folder / "validation", exact, judge_of(self.objective))
        self.alarms = Alarms(config, measured=self.validation.exact, speaks=self.processes.main)
        self.state = RunState(self.trainee, self.objective, self.feed, self.setup.margins, self.best, self.alarms)

    def _train(self, step: int | None) -> None:
        self.accelerator.init_trackers("tensorboard")
        self.runlog = RunLog(self.folder, self.accelerator, step, self.config.steps)
        try:
            if step is None:
                self.students.write("base", "student")
                start = self._clock()
                self.objective.prepare(self._log)
                self._seconds += self.processes.mean({"seconds": self._clock() - start})["seconds"]
                self._save(0)
            self._loop(step or 0)
        except DivergedError as error:
            if self.config.on_alarm != "best":
                raise
            end_with_best(self.folder, error.diagnosis, self.best, self.students, self.processes)
        finally:
            self.runlog.close()

    def _loop(self, first: int) -> None:
        config = self.config
        for step in range(first, config.steps):
            start = self._clock()
            with self.watch("data"):
                examples = next_examples(self.setup, step)
            metrics = self.objective.step(examples, step)
            # Averaged, so that all processes stop, and sound the alarm, at the same step.
            metrics = self.processes.mean(metrics | {"seconds": self._clock() - start})
            self._seconds += metrics.pop("seconds")
            metrics["data/generation"] = self.feed.generation
            done = step + 1
            last = self._finished(done)
            if done % config.validate_every_steps == 0 or last:
                metrics |= self.validation.run(done)
                self.best.update(done, metrics)
            self._log(step, metrics)
            self.alarms.check(step, metrics)
            if done % config.save_every_steps == 0 or last:
                self._save(done, last)
            if last:
                return
            self.feed.renew()

    def _finished(self, steps: int) -> bool:
        limit = self.config.seconds
        return steps >= self.config.steps or (limit is not None and steps > 0 and self._seconds >= limit)

    def _log(self, step: int, metrics: Metrics) -> None:
        self.runlog.write(step, metrics, self.watch.read())

    def _save(self, step: int, last: bool = False) -> None:
        if not last:  # before the state is taken: the checkpoint records what is read from here on
            self.feed.follow(step)
        counted = {"step": step, "seconds": self._seconds, "identity": self._identity}
        state = counted | self.state.state_dict()
        # Students first: a finished run's checkpoint promises that they are there.
        self.students.write("student", "student")
        self.students.write("ema", "ema")
        if self.best.step is not None:
            self.students.write("best", "best")
        if self.processes.main:
            self.setup.margins.write(self.folder / MARGINS)
        folder = self.folder / "checkpoints"
        save_checkpoint(folder / f"step-{step:06d}", self.state.parts(), state, self.processes)
        if self.processes.main:
            prune_checkpoints(folder, self.config.keep_checkpoints)
            self.feed.keep([state["data"] for state in saved_states(folder)])

    def _resume(self) -> int | None:
        """Restore the newest checkpoint; returns its step, None if there is none."""
        if self._checkpoint is None:
            return None
        state = load_checkpoint(self._checkpoint, self.state.parts())
        self.state.load_state_dict(state)
        log.info(f"resuming from {self._checkpoint}")
        return state["step"]
