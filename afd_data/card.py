"""The dataset card of a cache: `README.md` whose head declares splits and features for stock readers, and its picture.

`datasets` would infer features from the first few samples and drop or zero what deviates later; with them declared it
need not guess.  Says what the data is, from whom, under which terms, and how to load it.  Everything is read from index
and records; texts of strangers (prompts, names, terms) are escaped.

What stock readers get: of each split whole generations, namely those that hold the newest video of at least one key.
Where a refresh asked for everything again that is the newest generation alone; where it asked for a part, older videos
that were replaced are in there too, which the card says.
"""

from __future__ import annotations

import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from afd_data.card_facts import SHOWN, Facts, complete, read_facts
from afd_data.files import atomic_write
from afd_data.origin_record import CARD, SHEET
from afd_data.sample import SPLITS, Sample
from afd_data.shards import Manifest, read_manifest
from afd_data.sheet import write_sheet

TEMPLATE = "card.md.j2"
HUB_LICENCES = ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "apache-2.0", "mit", "unknown")
HUB_TYPES = {"int": "int64", "float": "float64", "str": "string"}
TAGS = ("webdataset", "video", "distillation", "adversarial-flow-distillation")


def write_card(folder: Path) -> None:
    """Write card and contact sheet of the cache `folder`; the card is durable.  An empty cache gets neither.

    Raises UserError: a damaged manifest, index, record or video.
    """
    manifest = complete(read_manifest(folder))
    if manifest.shards:
        write_card_of(folder, manifest, read_facts(folder, manifest), folder, "OWNER/NAME")


def write_card_of(folder: Path, manifest: Manifest, facts: Facts, out: Path, repo: str) -> None:
    """Write both to the folder `out`, for readers who find the cache as the dataset `repo` (OWNER/NAME)."""
    write_sheet(folder, facts.shown, out / SHEET)
    with atomic_write(out / CARD) as file:
        file.write(card_text(manifest, facts, repo).encode())


def card_text(manifest: Manifest, facts: Facts, repo: str) -> str:
    """The text of `README.md`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; the template escapes what strangers wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spoken"] = spoken
    environment.filters["link"] = _link
    body = environment.get_template(TEMPLATE).render(_context(manifest, facts), repo=repo, sheet=SHEET)
    head = yaml.safe_dump(_head(manifest, facts), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + re.sub(r"\n{3,}", "\n\n", body)


def spoken(text: str) -> str:
    """One line of plain text: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~])", r"\\\1", " ".join(text.split()))


def _link(address: str) -> str:
    """A link where the text is plainly an address, else the text."""
    return f"<{address}>" if re.fullmatch(r"https?://[\w.:/?&=%#~+,;@-]+", address, re.ASCII) else spoken(address)


def hub_licence(licences: set[str]) -> dict[str, str]:
    """The licence as the head of a card says it; several are `other`."""
    name = licences.pop().lower() if len(licences) == 1 else "several"
    if name in HUB_LICENCES:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name).strip("-") or "other"}


def _head(manifest: Manifest, facts: Facts) -> dict[str, Any]:
    data_files = [
        {"split": split, "path": [f"data/{split}/g{generation:04d}-*.tar" for generation in facts.current(split)]}
        for split in SPLITS
        if manifest.of(split)
    ]
    return {
        **hub_licence({terms.licence for terms in facts.terms}),
        "task_categories": ["text-to-video"],
        "tags": list(TAGS),
        "configs": [{"config_name": "default", "data_files": data_files}],
        "dataset_info": {"config_name": "default", "features": _features()},
    }


def _features() -> list[dict[str, Any]]:
    """What the webdataset reader of `datasets` yields, in the order that it has by itself."""
    record = [{"name": field.name, "dtype": HUB_TYPES[str(field.type)]} for field in fields(Sample)]
    return [
        {"name": "json", "struct": record},
        {"name": "mp4", "dtype": "video"},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _context(manifest: Manifest, facts: Facts) -> dict[str, Any]:
    splits = [split for split in SPLITS if manifest.of(split)]
    return {
        "names": sorted({terms.teacher for terms in facts.terms}),
        "total": sum(facts.videos.values()),
        "prompts": sum(len(found) for found in facts.prompts.values()),
        "hours": _length(facts.seconds),
        "shown": min(SHOWN, len(facts.shown)),
        "splits": [_split_row(split, manifest, facts) for split in splits],
        "shapes": [shape for shape, _ in facts.shapes.most_common()],
        "words": (min(facts.words), facts.median_words(), max(facts.words)),
        "costs": [(currency, count, total) for currency, (count, total) in sorted(facts.costs.items())],
        "examples": facts.examples,
        "teachers": facts.terms.most_common(),
        "rounds": [
            (number, this.videos, _days(this.first, this.last)) for number, this in sorted(facts.rounds.items())
        ],
        "superseded": sum(facts.superseded(split, manifest) for split in splits),
        "split": splits[0],
        "first": manifest.of(splits[0])[0].file,
    }


def _split_row(split: str, manifest: Manifest, facts: Facts) -> list[str]:
    shards = manifest.of(split)
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    return [split, str(facts.videos[split]), str(len(facts.prompts[split])), str(len(shards)), f"{megabytes:.1f}"]


def _length(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"


def _days(first: float, last: float) -> str:
    days = [_day(first), _day(last)]
    return days[0] if days[0] == days[1] else " to ".join(days)


def _day(seconds: float) -> str:
    """The day in UTC; a tar's header may hold a number that is none."""
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"
