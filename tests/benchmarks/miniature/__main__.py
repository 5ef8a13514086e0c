"""The miniature: methods against each other over training seeds, in a world that can be judged exactly.

    python -m tests.benchmarks.miniature --world multimodal --methods core --seeds 5 --minutes-per-run 2 --jobs 2

Every method starts from the same base, reads the same cached videos of the same teacher, and has the same seconds of
one thread, warm-ups included.  Stop it at any moment; the same command again goes on, and more --seeds or --methods add
to what is there.  Writes OUT/WORLD/SPLIT/{results.json, table.md, plots.png, plots.svg} and prints the table.

Settings are chosen with --split validation.  --split test writes its use into recipes/miniature/test_uses.jsonl first,
and refuses other settings of a method that was tested before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from afd_data.errors import UserError
from afd_train.evaluation.provenance import git_commit
from tests.benchmarks.miniature import ledger, study
from tests.benchmarks.miniature.markdown import page
from tests.benchmarks.miniature.methods import AFD, BASE, GROUPS, METHODS, chosen
from tests.benchmarks.miniature.plots import write_plots
from tests.benchmarks.miniature.results import results_of
from tests.benchmarks.miniature.study import Plan


def main(arguments: list[str]) -> int:
    """Exit code: 0; 1 where a training failed; 2 for what the user can mend."""
    options = _options(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        failed = run(options, shlex.join(["python", "-m", "tests.benchmarks.miniature", *arguments]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: run the same command again to go on.", file=sys.stderr)
        return 130
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def run(options: argparse.Namespace, command: str) -> list[str]:
    """The whole study; returns what failed.  Raises UserError."""
    plan = _plan(options)
    commit = git_commit() or "unknown"  # now: the book of uses is a file of the checkout
    testing = plan.split == "test"
    if testing:
        ledger.check(options.ledger, plan.world, plan.digests, options.use_test_again)
    study.claim(plan)
    study.prepare(plan)
    failed = study.train(plan)
    if testing:
        ledger.record(options.ledger, plan.world, plan.digests, options.use_test_again, commit)
    study.measure(plan)
    results, folder = results_of(plan, command, commit), plan.folder / plan.split
    (folder / "results.json").write_text(json.dumps(results.to_json(), indent=1, allow_nan=False), encoding="utf-8")
    (folder / "table.md").write_text(page(results), encoding="utf-8")
    write_plots(results, folder)
    print(page(results))
    return failed


def listing() -> str:
    """Methods with their questions, and groups."""
    lines = [f"{name:26} {method.question}" for name, method in METHODS.items()]
    return "\n".join([*lines, "", *(f"{name:26} = {' '.join(group)}" for name, group in GROUPS.items())])


def _plan(options: argparse.Namespace) -> Plan:
    changes = dict(_pair(text) for text in options.set)
    return Plan(
        folder=options.out / Path(options.world).stem,
        world=options.world,
        methods=chosen(options.methods),
        seeds=range(options.seeds),
        minutes=options.minutes_per_run,
        split=options.split,
        jobs=options.jobs,
        changes=changes,
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: expected KEY=VALUE")
    return key, value


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--world", default="multimodal", help="multimodal, deterministic, framewise, or a recipe")
    add("--methods", nargs="+", default=[BASE, "sft", AFD], metavar="NAME", help="methods and groups; see --list")
    add("--seeds", type=int, default=5, help="how many, from 0")
    add("--minutes-per-run", type=float, default=2.0, help="of one thread's training, warm-ups included")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--split", choices=["validation", "test"], default="validation")
    add("--out", type=Path, default=Path("runs/miniature"))
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all methods; repeatable")
    add("--ledger", type=Path, default=ledger.DEFAULT, help="where uses of the test prompts are kept")
    add("--use-test-again", metavar="REASON", help="measure other settings on the test prompts; the reason is kept")
    add("--list", action="store_true", help="print methods and groups, and end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
