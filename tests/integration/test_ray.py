"""A cache made by a real Ray cluster on this machine: the same videos, deaths of workers, errors, secrets."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from afd_data.config import CommandConfig
from afd_data.engine import cache_with_ray
from afd_data.errors import UserError
from afd_data.inspection import verify
from afd_data.journal import open_journal
from tests.parts import members, play, prompts, recipe

pytestmark = pytest.mark.slow  # a Ray cluster takes some 10 s to start
SECRET = "sk-4711-must-not-be-written"
PLAN = prompts(10)

# Draws a video of one colour per prompt; dies or complains first where the environment says so.
PROGRAM = """
import os, sys
from pathlib import Path

import numpy as np
from afd_data.config import VideoConfig
from afd_data.video import write_mp4

prompt, seed, output, once = sys.argv[1:]
assert os.environ["AFD_TEST_KEY"].startswith("sk-")
if prompt.startswith("a red"):
    try:
        open(once, "x").close()
    except FileExistsError:
        pass
    else:
        os.kill(os.getppid(), 9)
picture = np.random.default_rng(int(seed)).integers(0, 255, (16, 16, 3), np.uint8)
write_mp4(Path(output), np.stack([np.roll(picture, n, axis=1) for n in range(12)]), VideoConfig(lossless=True))
"""


@pytest.fixture(scope="module")
def session():
    """Where a cluster of 2 workers writes what it writes."""
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="afd-ray-", dir="/tmp")  # names of sockets must be short
    os.environ |= {"AFD_TEST_KEY": SECRET, "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(num_cpus=2, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
    yield Path(folder)
    ray.shutdown()
    del os.environ["AFD_TEST_KEY"]
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_makes_what_a_plain_run_makes(session, tmp_path):
    plain = play(tmp_path / "plain", PLAN)
    config = recipe(engine="ray", partitions=3)
    summary = cache_with_ray(config, PLAN, tmp_path / "ray", progress=False)
    assert members(tmp_path / "ray") == members(tmp_path / "plain")
    assert (summary.states, summary.sealed) == (plain.states, 9)
    assert verify(tmp_path / "ray") == []
    assert not (tmp_path / "ray" / "parts").exists()


def command(once: Path, program: Path) -> CommandConfig:
    program.write_text(PROGRAM)
    return CommandConfig(argv=("python", str(program), "{prompt}", "{seed}", "{output}", str(once)))


def test_a_part_whose_worker_was_killed_goes_on_and_no_secret_is_written(session, tmp_path):
    once = tmp_path / "died"
    teacher = command(once, tmp_path / "draw.py")
    config = recipe(partitions=2, near_duplicate=-1).model_copy(update={"teacher": teacher})
    summary = cache_with_ray(config, PLAN, tmp_path / "cache", progress=False)
    assert once.exists()  # a worker did die
    assert summary.states == {"sealed": 10}
    journal = open_journal(tmp_path / "cache")
    assert journal.select("SELECT count(DISTINCT fingerprint) FROM requests") == [(10,)]
    journal.close()
    for path in [*session.rglob("*"), *(tmp_path / "cache").rglob("*")]:
        if path.is_file() and not path.is_symlink():
            assert SECRET.encode() not in path.read_bytes(), path


def test_an_error_of_the_user_in_a_worker_reaches_the_driver_as_one(session, tmp_path):
    teacher = CommandConfig(argv=("no-such-program", "{prompt}", "{output}"))
    config = recipe(partitions=2, stop_after_failures=1).model_copy(update={"teacher": teacher})
    with pytest.raises(UserError, match=r"^part 0 of 2.*no-such-program"):
        cache_with_ray(config, PLAN, tmp_path / "cache", progress=False)


def test_a_teacher_on_cuda_is_refused_where_the_cluster_has_no_gpu(session, tmp_path):
    from afd_data.config import LocalConfig

    config = recipe(partitions=2).model_copy(update={"teacher": LocalConfig(model="any", device="cuda")})
    with pytest.raises(UserError, match="has no GPU"):
        cache_with_ray(config, PLAN, tmp_path / "cache", progress=False)
