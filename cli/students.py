"""Commands about one student: take it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def resolved(student: str) -> tuple[Path, Any]:
    """The folder that STUDENT means and the recipe it was trained by, if it is named by that.

    A folder, one on the Hub (hf://...), or a trained recipe, whose `export.policy` says which of its students.
    """
    if student.startswith("hf://"):
        from afd_train.hub import local_path

        return local_path(student, "STUDENT"), None
    if Path(student).is_dir():
        return Path(student), None
    from afd_train.recipe import load_recipe
    from afd_train.runs import student_folder

    recipe = load_recipe(student)
    return student_folder(recipe, recipe.export.policy), recipe


@click.command(short_help="Write a student for other programs.")
@click.argument("student", metavar="STUDENT")
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["diffusers", "original", "lora", "merged"]),
    default="diffusers",
    show_default=True,
    help="Who is to open it; see above.",
)
def export(student: str, output: Path, format: Any) -> None:
    """Write STUDENT to OUTPUT so that other programs can open it.

    STUDENT is a student's folder, or a recipe that has been trained.  OUTPUT must not be there yet.

    \b
    Formats:
      diffusers  a folder for WanTransformer3DModel.from_pretrained(OUTPUT)
      original   a .pt file for the inference of Self-Forcing and Causal-Forcing
      lora       the adapter of a LoRA run, a folder for PeftModel.from_pretrained
      merged     a student's folder that needs no base beside it

    Weights are the student's own, bit for bit; diffusers, original and merged hold a LoRA run's merged into its base.

    \b
      afd export quickstart quickstart-diffusers
      afd export runs/mine/train/students/ema mine.pt --format original
    """
    from afd_train.export import export_student

    click.echo(f"Wrote {export_student(resolved(student)[0], output, format)}")


@click.command("push-student", short_help="Publish a student on the Hub.")
@click.argument("repo", metavar="REPO")
@click.argument("student", metavar="STUDENT")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--licence", help="Of the weights, such as apache-2.0; default: unknown.")
@click.option("--accept-unknown-terms", is_flag=True, help="Publish although the teacher's terms are unknown.")
@click.option("--dry-run", is_flag=True, help="Print files, sizes and the model card; send nothing.")
def push_student(
    repo: str, student: str, private: bool, licence: str | None, accept_unknown_terms: bool, dry_run: bool
) -> None:
    """Publish STUDENT as the model repository REPO (OWNER/NAME) of the Hugging Face Hub.

    STUDENT is a recipe that has been trained, or a student's folder.  With a recipe the model card tells how it was
    trained, from which teacher, and what `afd eval` measured.  The same command again sends what has changed and writes
    the card anew.  `hf auth login` gives the token.

    \b
      afd push-student me/my-student my.yaml --licence apache-2.0
      afd push-student me/my-student runs/mine/train/students/ema --dry-run
    """
    from afd_train import publish

    folder, recipe = resolved(student)
    policy = recipe.export.policy if recipe else "ema"
    if dry_run:
        with publish.prepared(folder, repo, recipe=recipe, licence=licence, policy=policy) as push:
            sizes = push.sizes()
            click.echo("\n".join(f"{size:>14,}  {path}" for path, size in sizes.items()))
            click.echo(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files for {push.repo}\n")
            click.echo(push.card)
            publish.check_terms(push.distillation, accept_unknown_terms)
        return
    url = publish.push_student(
        folder,
        repo,
        recipe=recipe,
        licence=licence,
        private=private,
        policy=policy,
        accept_unknown_terms=accept_unknown_terms,
    )
    click.echo(f"Published {url}")
