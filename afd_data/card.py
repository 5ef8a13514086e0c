"""The dataset card of a cache: `README.md` whose head declares splits and features for stock readers.

`datasets` would infer features from the first few samples and drop or zero what deviates later; with them declared it
need not guess.  Says what the data is, from whom, under which terms, and how to load it.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from afd_data.files import atomic_write
from afd_data.sample import SPLITS, Sample
from afd_data.shards import Manifest
from afd_data.teachers import Identity

CARD = "README.md"
HUB_LICENCES = ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "apache-2.0", "mit", "unknown")
HUB_TYPES = {"int": "int64", "float": "float64", "str": "string"}

BODY = """
# Videos of the teacher `{teacher}`

Made by [adversarial-flow-distillation](https://pypi.org/project/adversarial-flow-distillation/) (`afd cache-teacher`).

| split | videos | shards | MB |
|---|---|---|---|
{rows}

* Teacher: `{teacher}`, version `{version}`
* Videos: {width}x{height} pixels, {frames} frames at {fps:g} fps, H.264 in mp4, no sound
* Licence of the videos: {licence}
* Distillation under the teacher's terms: {distillation}
* Settings asked for: `{settings}`

A sample is `KEY.mp4` and `KEY.json` in a tar.  The JSON holds the prompt, the seed, settings asked for and used,
provenance, cost, and `world_json`: the exact state of a simulated world.  `manifest.json` names every shard with its
sha256; `index/SPLIT.parquet` has one row a video.

```python
from datasets import Video, load_dataset

videos = load_dataset("FOLDER_OR_REPO", split="{split}", streaming=True).cast_column("mp4", Video(decode=False))
```

```python
import webdataset

videos = webdataset.WebDataset("data/{split}/g0000-{{000000..NNNNNN}}.tar", shardshuffle=False)
```
"""


def write_card(folder: Path, manifest: Manifest, identity: Identity, video: dict[str, Any]) -> None:
    """Write the card of the cache `folder` durably; `video` is the recipe's section as a dict."""
    rows = [
        f"| {split} | {count} | {len(manifest.of(split))} | {sum(s.bytes for s in manifest.of(split)) / 1e6:.1f} |"
        for split, count in manifest.samples().items()
    ]
    body = BODY.format(
        teacher=identity.name,
        version=identity.version,
        licence=identity.licence,
        distillation=identity.distillation,
        settings=json.dumps(identity.settings, sort_keys=True),
        rows="\n".join(rows),
        split=next(iter(manifest.samples()), "train"),
        **video,
    )
    head = yaml.safe_dump(_head(manifest, identity), sort_keys=False, allow_unicode=True)
    with atomic_write(folder / CARD) as file:
        file.write(f"---\n{head}---\n{body}".encode())


def _head(manifest: Manifest, identity: Identity) -> dict[str, Any]:
    licence = identity.licence.lower()
    terms = {"license": licence}
    if licence not in HUB_LICENCES:
        terms = {"license": "other", "license_name": identity.licence}
    splits = [split for split in SPLITS if manifest.of(split)]
    return {
        **terms,
        "task_categories": ["text-to-video"],
        "tags": ["webdataset", "video", "distillation"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}/*.tar"} for split in splits],
            }
        ],
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
