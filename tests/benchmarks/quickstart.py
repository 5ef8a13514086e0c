"""The quickstart's claim, over training seeds: AFD against its control and against supervised fine-tuning.

    python -m tests.benchmarks.quickstart --seeds 0 1 2 --jobs 2 --out runs/quickstart-seeds

Three methods start from the same base student and read the same cache: `afd` is the recipe as it ships, `shuffled` the
same with every rollout given another rollout's advantage, `sft` flow matching on the teacher's videos for as many
seconds as AFD took, warm-up included.  Every run is compared with the base on the split's prompts, paired by prompt.
Resumable: finished runs are kept.  Prints a markdown table and writes results.json.  Never fails on a number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

RECIPE = "quickstart"
SHOWN = ("object_permanence", "ghost_mass", "jump", "motion", "gravity_error", "physics_ok")
SFT = {
    "train.objective": "{name: flow-matching}",
    "train.steps": "100000",
    "train.prompts_per_step": "32",
    "train.validate_every_steps": "1000",
    "train.save_every_steps": "1000",
}


def main() -> None:
    """Run what is missing, then print the table."""
    options = _options()
    out = Path(options.out)
    _afd("cache-teacher", out / "data", {}, options.threads)
    runs: dict[tuple[str, int], Future[list[dict]]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for method in sorted(options.methods):
            for seed in options.seeds:
                afd = runs.get(("afd", seed)) if method == "sft" else None  # sft gets the seconds that afd took
                runs[method, seed] = pool.submit(_run, method, seed, out, options, afd)
    rows = [row for run in runs.values() for row in run.result()]
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=["afd", "shuffled", "sft"], default=["afd", "shuffled", "sft"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--out", default="runs/quickstart-seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the afd and shuffled runs")
    return parser.parse_args()


def _run(
    method: str, seed: int, out: Path, options: argparse.Namespace, after: Future[list[dict]] | None
) -> list[dict]:
    """Train and measure one method with one seed, once the run `after` has ended."""
    if after is not None:
        after.result()
    folder = out / f"{method}-{seed}"
    changes = {"train.seconds": "null"} | dict(item.split("=", 1) for item in options.set)
    match method:
        case "shuffled":
            changes |= {"train.objective.shuffled_advantages": "true"}
        case "sft":
            changes = SFT | {"train.seconds": f"{_training_seconds(out / f'afd-{seed}'):.1f}"}
    common = {"seed": str(seed), "stream.folder": str(out / "data" / "cache")}
    _afd("train", folder, common | changes, options.threads)
    measured = folder / f"{options.split}.json"
    if not measured.exists():
        measured.write_text(json.dumps(_measure(folder, out / "data", options.split)))
    return [{"method": method, "seed": seed, **row} for row in json.loads(measured.read_text())]


def _afd(command: str, folder: Path, settings: dict[str, str], threads: int) -> None:
    changes = [f"--set={key}={value}" for key, value in {"out": str(folder), **settings}.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "afd_cli", command, RECIPE, *changes], env=environment, check=True)


def _training_seconds(folder: Path) -> float:
    """What the parts of all steps took, the discriminator's warm-up included, validation not."""
    total = 0.0
    for line in (folder / "train" / "timings.jsonl").read_text().splitlines():
        total += sum(value for key, value in json.loads(line).items() if key not in ("step", "seconds/validation"))
    return total


def _measure(folder: Path, data: Path, split: str) -> list[dict]:
    """Base and averaged student on the split's prompts x 4: one row a metric."""
    from afd_data.stream import Stream
    from afd_train.evaluation.compare import Row, summarise
    from afd_train.evaluation.physics import METRICS, measure
    from afd_train.recipe import load_recipe
    from afd_train.students.folder import open_student
    from afd_train.validation import prompts_of

    recipe = load_recipe(RECIPE)
    prompts = prompts_of(Stream(data / "cache", recipe.stream, split, seed=0))
    rows = []
    for policy in ("base", "ema"):
        student = open_student(folder / "train" / "students" / policy)
        videos = student.videos(prompts, recipe.eval.seed, recipe.eval.clips_per_prompt)
        for (prompt_id, prompt), takes in zip(prompts, videos, strict=True):
            for take, video in enumerate(takes):
                found = measure(video, recipe.video.fps, prompt)
                rows += [Row(policy, prompt_id, prompt, take, name, value, 0) for name, value in found.items()]
    compared = summarise(rows, METRICS, recipe.eval.resamples, seed=0).comparisons
    keys = ("metric", "n", "mean_a", "mean_b", "delta", "lo", "hi", "p")
    return [{key: vars(found)[key] for key in keys} for found in compared if found.a == "ema"]


def table(rows: list[dict]) -> str:
    """Markdown: one line a method and seed; object permanence with its interval, then plain means."""
    head = ["method", "seed", "object permanence", "difference to the base [95 %]", *SHOWN[1:]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows):
        found = {row["metric"]: row for row in rows if (row["method"], row["seed"]) == (method, seed)}
        first = found[SHOWN[0]]
        interval = f"{first['delta']:+.3f} [{first['lo']:+.3f}, {first['hi']:+.3f}]"
        cells = [
            method,
            seed,
            f"{first['mean_a']:.3f}",
            interval,
            *(f"{found[name]['mean_a']:.3f}" for name in SHOWN[1:]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    base = {row["metric"]: row["mean_b"] for row in rows}
    lines.append(
        "| base | | " + " | ".join([f"{base[SHOWN[0]]:.3f}", "", *(f"{base[n]:.3f}" for n in SHOWN[1:])]) + " |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
