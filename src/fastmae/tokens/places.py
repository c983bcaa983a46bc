"""Folders behind URLs that files are copied to: what lies there, and how more is put there.

Object storage shows a file when it is complete. So does the hub, which takes several files in one commit. What else
fsspec writes to (another disk, SFTP) may show the beginning of a file for a while, as any copying does.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastmae.errors import InputError, first_line
from fastmae.tokens import transfer
from fastmae.tokens.access import refusal

Source = Path | bytes
"""What is copied: a file on this machine, or a few bytes."""
AT_ONCE = 4
"""Files that are sent to object storage at the same time. s3fs and gcsfs cut a large one into parts besides."""
PAUSE = 0.2
"""Seconds between two looks for Ctrl-C while files are sent."""
COMMIT_BYTES, COMMIT_FILES = 1 << 30, 64
"""Of one commit on the hub: what a kill may have to send again at most. The hub allows only so many commits an hour."""
HUB = "hf://"
HUB_KINDS = {"datasets": "dataset", "spaces": "space"}


@dataclass(frozen=True)
class Found:
    """A file that lies behind a URL.

    Attributes:
        size: its bytes.
        digests: what the server tells about its contents: algorithm (md5, sha256, or git for a git blob) -> hex.
    """

    size: int
    digests: Mapping[str, str] = field(default_factory=dict)


class Place(Protocol):
    """A folder behind a URL. Every error is an InputError that names it."""

    url: str

    def begin(self) -> None:
        """Make what has to be there before files are."""

    def found(self) -> dict[str, Found]:
        """The files that lie there, by their names within the folder."""

    def put(self, files: Mapping[str, Source], on_sent: Callable[[int], object]) -> None:
        """Copy files there, in place of those of the same names.

        Args:
            files: by the names that they get.
            on_sent: called with the bytes of what has arrived, for progress.
        """


def open_place(url: str) -> Place:
    """The folder behind a URL, to copy to.

    Raises:
        InputError: a URL that can't be written to, or whose package is not installed.
    """
    url = url.rstrip("/")
    protocol = url.partition("://")[0]
    if protocol in {"http", "https"}:
        raise InputError(f"{url}: can't be written to; give a URL of s3://, gs:// or hf://")
    if "://" not in url:
        raise InputError(f"{url}: is no URL; give one of s3://, gs:// or hf://, or copy the folder")
    return HubRepository(url) if url.startswith(HUB) and not url.startswith(f"{HUB}buckets/") else Storage(url)


def size_of(source: Source) -> int:
    """Bytes of what is copied."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


class Storage:
    """A folder of object storage, or of any file system that fsspec writes to."""

    def __init__(self, url: str):
        self.url = url
        self._files, self._root = transfer.file_system(os.getpid(), url)

    def begin(self) -> None:
        """Nothing has to be there: a folder is a part of its files' names."""

    def found(self) -> dict[str, Found]:
        """See `Place`."""

        def listed() -> dict[str, Any]:
            self._files.invalidate_cache()
            try:
                entries: dict[str, Any] = self._files.find(self._root, detail=True)
            except FileNotFoundError as error:
                if self._files.async_impl:  # object storage, where an empty folder is as good as one that is there
                    raise InputError(f"{self.url}: no such bucket; check the address, or make it first") from error
                return {}
            return entries

        entries = transfer.with_retries(listed, self.url, "listed")
        prefix = f"{self._root.rstrip('/')}/"
        return {
            name.removeprefix(prefix): Found(entry["size"], dict(_md5(entry)))
            for name, entry in entries.items()
            if name.startswith(prefix)
        }

    def put(self, files: Mapping[str, Source], on_sent: Callable[[int], object]) -> None:
        """See `Place`."""
        if self._files.async_impl:
            self._put_at_once(files, on_sent)
            return
        for name, source in files.items():
            transfer.with_retries(partial(self._put_one, name, source), f"{self.url}/{name}", "sent")
            on_sent(size_of(source))

    def _put_one(self, name: str, source: Source) -> None:
        path = f"{self._root}/{name}"
        self._files.makedirs(self._files._parent(path), exist_ok=True)
        if isinstance(source, bytes):
            self._files.pipe_file(path, source)
        else:
            self._files.put_file(str(source), path)

    def _put_at_once(self, files: Mapping[str, Source], on_sent: Callable[[int], object]) -> None:
        """Send several files at the same time on fsspec's loop, and end them when this thread is interrupted."""
        limit = asyncio.Semaphore(AT_ONCE)

        async def send(name: str, source: Source) -> int:
            path, url = f"{self._root}/{name}", f"{self.url}/{name}"
            async with limit:
                for pause in (*transfer.RETRY_AFTER, None):
                    try:
                        if isinstance(source, bytes):
                            await self._files._pipe_file(path, source)
                        else:
                            await self._files._put_file(str(source), path)
                        break
                    except Exception as error:
                        if (refused := refusal(error, url)) is not None:
                            raise refused from error
                        if pause is None:
                            attempts = f"{first_line(error)}, tried {len(transfer.RETRY_AFTER) + 1} times"
                            way_out = "check the network and give the same command again, it continues"
                            raise InputError(f"{url}: can't be sent ({attempts}); {way_out}") from error
                        await asyncio.sleep(pause)
            return size_of(source)

        loop = self._files.loop
        sending = {asyncio.run_coroutine_threadsafe(send(name, source), loop) for name, source in files.items()}
        try:
            while sending:
                done, sending = concurrent.futures.wait(sending, PAUSE, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    on_sent(future.result())
        finally:
            for future in sending:
                future.cancel()


class HubRepository:
    """A repository of the model hub, or a folder in it. One that does not exist is made, and is private at first.

    Args:
        url: hf://datasets/OWNER/NAME, hf://OWNER/NAME for a model, and a folder behind it. OWNER/NAME@REVISION names a
            branch.
    """

    def __init__(self, url: str):
        from huggingface_hub import HfApi  # noqa: PLC0415 - takes a second

        self.url, self._api = url, HfApi()
        kind, *parts = (url.removeprefix(HUB)).split("/")
        if kind not in HUB_KINDS:
            kind, parts = "", [kind, *parts]
        if len(parts) < 2 or not all(parts):
            raise InputError(
                f"{url}: names no repository of the hub; give {HUB}datasets/OWNER/NAME for a store, "
                f"{HUB}OWNER/NAME for a model"
            )
        name, _, revision = parts[1].partition("@")
        self.folder = "/".join(parts[2:])
        self._where: dict[str, Any] = {"repo_id": f"{parts[0]}/{name}", "repo_type": HUB_KINDS.get(kind, "model")}
        self._revision = revision or None

    @property
    def root(self) -> str:
        """URL of the repository's own folder on this branch."""
        return self.url.removesuffix(f"/{self.folder}") if self.folder else self.url

    def begin(self) -> None:
        """See `Place`."""

        def make() -> None:
            if not self._api.repo_exists(**self._where):
                self._api.create_repo(**self._where, private=True, exist_ok=True)

        self._ask(make, "made")

    def found(self) -> dict[str, Found]:
        """See `Place`."""
        from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

        def listed() -> dict[str, Found]:
            found = {}
            folder = self.folder or None
            try:
                for entry in self._api.list_repo_tree(
                    **self._where, path_in_repo=folder, recursive=True, revision=self._revision
                ):
                    if (size := getattr(entry, "size", None)) is not None:
                        found[self._below(entry.path)] = Found(size, _hub_digests(entry))
            except EntryNotFoundError:  # no such folder yet
                return {}
            return found

        return self._ask(listed, "listed")

    def put(self, files: Mapping[str, Source], on_sent: Callable[[int], object]) -> None:
        """See `Place`. Several files make a commit."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        for batch in _batches(files):

            def commit(batch: Mapping[str, Source] = batch) -> None:
                operations = [
                    CommitOperationAdd(
                        f"{self.folder}/{name}".lstrip("/"), source if isinstance(source, bytes) else str(source)
                    )
                    for name, source in batch.items()
                ]
                message = f"Copy {len(batch)} files of fastmae" if len(batch) > 1 else f"Copy {next(iter(batch))}"
                self._api.create_commit(
                    **self._where, operations=operations, commit_message=message, revision=self._revision
                )

            self._ask(commit, "sent")
            on_sent(sum(size_of(source) for source in batch.values()))

    def _below(self, path: str) -> str:
        return path.removeprefix(f"{self.folder}/") if self.folder else path

    def _ask(self, request: Callable[[], transfer.Result], what: str) -> transfer.Result:
        with _without_bars():
            return transfer.with_retries(request, self.url, what)


def _batches(files: Mapping[str, Source]) -> Iterator[dict[str, Source]]:
    """The files of one commit each, in their order."""
    batch: dict[str, Source] = {}
    held = 0
    for name, source in files.items():
        size = size_of(source)
        if batch and (held + size > COMMIT_BYTES or len(batch) == COMMIT_FILES):
            yield batch
            batch, held = {}, 0
        batch[name] = source
        held += size
    if batch:
        yield batch


def _md5(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The MD5 of an object, where its listing has it: not of one that was sent to S3 in parts."""
    tag = str(entry.get("ETag", "")).strip('"')
    if len(tag) == 32 and "md5Hash" not in entry:
        yield "md5", tag
    with contextlib.suppress(ValueError):
        if "md5Hash" in entry:
            yield "md5", base64.b64decode(entry["md5Hash"]).hex()


def _hub_digests(entry: Any) -> dict[str, str]:
    return {"sha256": entry.lfs["sha256"]} if entry.lfs else {"git": entry.blob_id}


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without huggingface_hub's own progress bars: fastmae has one over all files."""
    from huggingface_hub.utils import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_disabled = are_progress_bars_disabled()
    if were_disabled:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
