"""`origin.json` of a cache folder: at which address the tars lie that are not in it; and whose cache lies there."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.hub import explained_reading
from afd_data.sample import check_types
from afd_data.shards import MANIFEST
from afd_data.storage import Storage, checked_url, shown

ORIGIN = "origin.json"
WRITER = "writer.json"  # at the origin: whose cache it is
CARD, SHEET = "README.md", "contact-sheet.png"
MAX_RECORD = 64 * 2**10  # bytes of a record about an origin
MAX_BYTES = {".json": 2**28, ".parquet": 2**34, ".md": 2**24, ".png": 2**28}  # of what lies beside the tars
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

    with explained_reading(url, match["revision"]):
        info = HfApi().dataset_info(match["repo"], revision=match["revision"])
    return f"hf://datasets/{match['repo']}@{info.sha}"


def claimed(storage: Storage, writer: str) -> bool:
    """Mark a place where no cache lies as that of the folder with the token `writer`; whether it is that folder's now.

    Raises UserError: no access, no such bucket.
    """
    if writer_of(storage) is None and storage.size(MANIFEST) is None:
        try:
            storage.create(WRITER, json.dumps({"writer": writer}).encode())
        except FileNotFoundError as error:
            raise no_place(storage, error) from None
        except FileExistsError:
            pass
        except UserError:  # also how some clients say that somebody else was quicker
            if writer_of(storage) is None:
                raise
    return writer_of(storage) == writer


def check_writer(storage: Storage, writer: str) -> None:
    """Raises UserError where the place is not marked as that of the folder with the token `writer`."""
    there = writer_of(storage)
    if there != writer:
        raise taken(storage, there)


def taken(storage: Storage, there: str | None) -> UserError:
    """What to say where a place cannot be written to; `there` as `writer_of` gave it."""
    if there == "":
        return UserError(f"{storage.url}/{WRITER}: damaged. If no other cache is written there, remove it.")
    return UserError(
        f"{storage.url}: another cache lies there, or is being written there. Name an empty place as cache.storage. "
        "If it is this one's and its folder was lost: "
        f"read it with stream.folder={storage.url}, or `afd cache pull` it."
    )


def no_place(storage: Storage, error: FileNotFoundError) -> UserError:
    """What to say where a file could not be sent because nothing is there that holds files."""
    return UserError(f"{storage.url}: no such bucket or repository; make it first ({shown(error)})")


def writer_of(storage: Storage) -> str | None:
    """The token of the folder that writes to a place; None where none does, "" where nobody can say."""
    try:
        record = json.loads(storage.read(WRITER, 0, MAX_RECORD))
        return str(record["writer"])
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
