"""The students that a run leaves in TRAIN/students, each written from a policy."""

from __future__ import annotations

from pathlib import Path

from afd_train.config import LoraConfig, TrainConfig
from afd_train.parallel import Processes, whole
from afd_train.policies import Policy, Trainee, lora_targets, plain_state
from afd_train.students import Student
from afd_train.students.folder import save_adapter, save_student


class Students:
    """Writes them, all processes together."""

    def __init__(self, folder: Path, student: Student, trainee: Trainee, config: TrainConfig, processes: Processes):
        self._folder, self._student, self._trainee = folder, student, trainee
        self._config, self._processes = config, processes

    def write(self, name: str, acting: Policy) -> None:
        """Write a policy as a student folder; but for the base, an adapted one is an adapter beside it."""
        target = self._folder / name
        with self._trainee.acting(acting):  # the tensors below are live
            adapter = None if name == "base" else self._trainee.adapter_state()
            state = {}
            for key, value in (adapter or plain_state(self._student.net)).items():
                full = whole(value)  # all processes have a part in it
                if self._processes.main:
                    state[key] = full.cpu()
            if self._processes.main and adapter is None:
                save_student(self._student, target, state=state)
            elif self._processes.main:
                policy = self._config.policy
                assert isinstance(policy, LoraConfig)
                targets = list(lora_targets(policy))
                save_adapter(target, self._student, "../base", state, policy.rank, policy.alpha, targets)
        self._processes.wait()
