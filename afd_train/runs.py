"""Where a run keeps what: the only file that knows the names of the folders below OUT.  Torch-free."""

from __future__ import annotations

from pathlib import Path

from afd_data.config import DataConfig


def cache_folder(recipe: DataConfig) -> Path:
    """What `cache-teacher` writes: `cache.folder`, or OUT/cache."""
    return Path(recipe.cache.folder) if recipe.cache.folder else Path(recipe.out) / "cache"


def stream_source(recipe: DataConfig) -> str:
    """The cache that training and evaluation read, a folder or an address: `stream.folder`, or the recipe's own."""
    return recipe.stream.folder or str(cache_folder(recipe))


def stream_folder(recipe: DataConfig) -> Path:
    """Where that cache's manifest and index lie, and what is computed from it: for an address, which is asked, a head.

    Raises UserError: nothing there, no access, no network.
    """
    from afd_data.origin import local_head

    return local_head(stream_source(recipe))


def train_folder(recipe: DataConfig) -> Path:
    """Checkpoints, metrics.jsonl, TensorBoard files, validation strips."""
    return Path(recipe.out) / "train"


def student_folder(recipe: DataConfig, policy: str = "ema") -> Path:
    """A student that training leaves behind: `base` (before), `student` (after), `ema` (its running average)."""
    return train_folder(recipe) / "students" / policy


def eval_folder(recipe: DataConfig) -> Path:
    """report.html, results.json, metrics.parquet, videos/."""
    return Path(recipe.out) / "eval"


def export_folder(recipe: DataConfig) -> Path:
    """The student for other programs: diffusers/, original.pt, lora/, merged/."""
    return Path(recipe.out) / "export"
