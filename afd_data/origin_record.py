"""`origin.json` of a cache folder: at which address the tars lie that are not in it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.sample import check_types
from afd_data.storage import Storage, checked_url, shown

ORIGIN = "origin.json"
WRITER = "writer.json"  # at the origin: whose cache it is
MAX_RECORD = 64 * 2**10  # bytes of a record about an origin
HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?")


@dataclass(frozen=True)
class Origin:
    """`url` as it was given; `pinned` is what is read, on the Hub one commit.

    `writer` is a token for the folder that writes there, "" for heads of what others write.
    """

    url: str
    pinned: str
    writer: str = ""


def index_file(split: str) -> str:
    """Where the index of a split lies in a cache, and at its origin."""
    return f"index/{split}.parquet"


def home() -> Path:
    """Where heads and copies of samples lie."""
    return Path(os.environ.get("AFD_HOME") or "~/.cache/afd").expanduser()


def read_origin(folder: Path) -> Origin | None:
    """None for a cache whose tars lie in the folder.  Raises UserError when `origin.json` is damaged."""
    path = folder / ORIGIN
    try:
        with open(path, "rb") as file:
            origin = Origin(**json.loads(file.read(MAX_RECORD)))
        check_types(origin)
        return Origin(checked_url(origin.url), checked_url(origin.pinned), origin.writer)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path}: not an address of a cache's tars ({error})") from None


def write_origin(folder: Path, origin: Origin) -> None:
    """Say durably where the tars of a folder lie."""
    with atomic_write(folder / ORIGIN) as file:
        file.write(json.dumps(asdict(origin)).encode())


def pinned_url(url: str) -> str:
    """The address of one commit where the place is a dataset on the Hub, since others may push while it is read.

    Raises UserError: no such dataset or revision, no access, no network.
    """
    if not url.startswith("hf://"):
        return url
    match = HUB.fullmatch(url)
    if match is None:
        raise UserError(f"{url}: not hf://datasets/OWNER/NAME[@REVISION]")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(match["repo"], revision=match["revision"])
    except RevisionNotFoundError:
        raise UserError(f"{url}: the repository has no branch, tag or commit {match['revision']!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{url}: no such dataset, or no access; `hf auth login` for a private one") from None
    except OSError as error:  # the client's errors of HTTP are some too
        raise UserError(f"{url}: the Hub cannot be reached ({shown(error)}). Run again.") from None
    return f"hf://datasets/{match['repo']}@{info.sha}"


def writer_of(storage: Storage) -> str | None:
    """The token of the folder that writes to a place; None where none does, "" where nobody can say."""
    try:
        record = json.loads(storage.read(WRITER, 0, MAX_RECORD))
        return str(record["writer"])
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
