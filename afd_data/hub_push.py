"""A cache of any size -> a dataset on the Hub, resumable.

A push sends new shards in commits of bounded size, then index, card, picture and manifest in one, and only
then takes pruned shards away.  So a reader never finds a manifest that names what is not there, and a push that was
killed goes on where it was.  What is there already is neither read nor sent again.  Journal, spool, leases and whatever
else lies in the folder stay at home.

Each state of the data gets a tag: `generation-0001` for the first push of generation 1, and `generation-0001-2`, ...
for later ones with more videos of the same generation.  Tags are never moved, so what was trained on stays readable.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.card import write_card_of
from afd_data.card_facts import complete, read_all_records, read_facts, terms_of
from afd_data.errors import UserError
from afd_data.hub import checked_name, explained_writing
from afd_data.hub_repository import Repository, check_no_token, hub_token
from afd_data.index import index_path, update_index
from afd_data.origin import ORIGIN, is_remote, whole
from afd_data.origin_record import CARD, SHEET
from afd_data.progress import progress_bar
from afd_data.sample import SPLITS, Sample, parse_sample
from afd_data.shards import MANIFEST, Manifest, Shard, read_manifest, read_member, scan_shard, write_manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

log = logging.getLogger(__name__)

COMMIT_BYTES, COMMIT_FILES = 5 * 10**9, 50  # of shards in a commit, unless one alone is larger


def push(folder: Path, repo: str, private: bool = False, message: str | None = None, progress: bool = True) -> str:
    """Publish the data of the cache `folder` as the dataset `repo` (OWNER/NAME); returns its address.

    private: of a repository that is made now.  Raises UserError: nothing is sealed, terms that forbid distillation, a
    damaged shard, another cache there, no token, a token in a text, no rights, no network, another push at the same
    time, a public repository although `private`.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # those of single files; ours counts the bytes of all
    repo = checked_name(repo.removeprefix("hf://").removeprefix("datasets/"))
    manifest = complete(read_manifest(folder))
    if not manifest.shards:
        raise UserError(f"{folder}: nothing is sealed in it. Run `afd cache-teacher` first, or name OUT/cache.")
    token = hub_token()
    with tempfile.TemporaryDirectory(prefix="afd-push-") as temporary:
        try:
            texts = _texts(folder, manifest, Path(temporary), repo, token)
        except UserError as error:
            raise UserError(str(error).replace(temporary, str(folder))) from None
        with explained_writing(repo, token):
            remote = Repository(repo, "dataset", private, token)
            _send(remote, folder, manifest, texts, message or f"Generation {manifest.generation}", progress)
    return remote.url


def _send(
    remote: Repository, folder: Path, manifest: Manifest, texts: Mapping[str, Path], message: str, progress: bool
) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = remote.files()
    if MANIFEST in there:
        _check_same_cache(remote, manifest)
    new = [shard for shard in manifest.shards if there.get(shard.file) != shard.sha256]
    with progress_bar(sum(shard.bytes for shard in new), "B", "push", disable=not progress, unit_scale=True) as bar:
        for part in _parts(new):
            additions = []
            for shard in part:
                additions.append(_sent_shard(remote, folder, shard))
                bar.update(shard.bytes)
            remote.commit(additions, f"{message}: {len(part)} shards")
    remote.commit([CommitOperationAdd(name, path) for name, path in texts.items()], message)
    remote.tag(f"generation-{manifest.generation:04d}")
    named = {shard.file for shard in manifest.shards}
    gone = [shard.file for shard in manifest.pruned if shard.file in there and shard.file not in named]
    if gone:
        remote.commit(
            [CommitOperationDelete(file) for file in gone], f"{message}: {len(gone)} pruned shards taken away"
        )


def _check_same_cache(remote: Repository, manifest: Manifest) -> None:
    """What lies there must be an earlier state of this cache, or readers would lose data."""
    known = {shard.file: shard.sha256 for shard in (*manifest.shards, *manifest.pruned)}
    odd = [shard.file for shard in remote.manifest().shards if known.get(shard.file) != shard.sha256]
    if odd:
        raise UserError(
            f"{remote.repo}: holds {odd[0]} of another cache, or of a later state of this one. Push to another "
            f"repository, or join them: `afd cache pull` it and `afd cache merge`."
        )


def _parts(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    part: list[Shard] = []
    for shard in shards:
        if part and (len(part) >= COMMIT_FILES or sum(each.bytes for each in part) + shard.bytes > COMMIT_BYTES):
            yield part
            part = []
        part.append(shard)
    if part:
        yield part


def _sent_shard(remote: Repository, folder: Path, shard: Shard) -> CommitOperationAdd:
    """Upload a shard for a later commit; what was uploaded before is not sent again."""
    from huggingface_hub import CommitOperationAdd

    with whole(folder, shard) as path:
        try:
            addition = CommitOperationAdd(shard.file, path)
        except (OSError, ValueError):
            raise UserError(f"{folder / shard.file}: gone. It may have been pruned; run the same again.") from None
        found = addition.upload_info.sha256.hex()
        if found != shard.sha256:
            raise UserError(f"{folder / shard.file}: sha256 is {found}, the manifest says {shard.sha256}; not sent.")
        if is_remote(folder, shard.file):  # the others were looked at before
            with open(path, "rb") as file:
                for entry in scan_shard(path):
                    data = read_member(file, entry, "json")
                    _check_record(parse_sample(data, f"{path}: {entry.key}.json"), data, remote.token)
        remote.api.preupload_lfs_files(remote.repo, [addition], repo_type=remote.kind)
    return addition


def _texts(folder: Path, manifest: Manifest, staging: Path, repo: str, token: str) -> dict[str, Path]:
    """Path in the repository -> file, of all that is no shard, made from a view of the cache in `staging`.

    Nothing is written to the cache, which may be in use.
    """
    write_manifest(staging, manifest)
    (staging / "data").symlink_to((folder / "data").resolve())
    (staging / "index").mkdir()
    for path in ((folder / ORIGIN), *(index_path(folder, split) for split in SPLITS)):
        if path.exists():
            shutil.copyfile(path, staging / path.relative_to(folder))
    update_index(staging)
    unknown = {
        sample.teacher
        for sample, data in read_all_records(staging, manifest)
        if _check_record(sample, data, token) == "unknown"
    }
    if unknown:
        log.warning(
            f"whether the terms of {', '.join(sorted(unknown))} allow distillation is unknown; the card says so. "
            "Read them before others use these videos."
        )
    write_card_of(staging, manifest, read_facts(staging, manifest), staging, repo)
    names = [index_path(Path(), split).as_posix() for split in manifest.samples()]
    texts = {name: staging / name for name in (*names, SHEET, CARD, MANIFEST)}
    check_no_token(texts, token)
    return texts


def _check_record(sample: Sample, data: bytes, token: str) -> str:
    """What the terms say of distillation.  Raises UserError where they forbid it, or where the record has the token."""
    if token.encode() in data:
        raise UserError(f"{sample.key}.json: has your token for the Hub in it. It cannot be taken out: cache again.")
    if sample.distillation == "disallowed":
        terms = terms_of(sample)
        where = f" ({terms.url})" if terms.url else ""
        raise UserError(
            f"{sample.key}: the terms of {sample.teacher}{where} do not allow distillation, so its videos are not "
            "published. Cache from a teacher whose terms allow it."
        )
    return sample.distillation
