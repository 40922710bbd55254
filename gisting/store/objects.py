"""The files of a store: one per compressed prompt, and those that a writer has not finished.

Place in the flow: below the store, next to the index. A file is written completely and synced in a directory that
belongs to its writer, and is then renamed into place while holding the index's write lock. A writer's directory is
locked with ``flock`` for as long as the writer lives, to tell what killed writers left from work in progress.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gisting.errors import CacheFormatError, StoreError

__all__ = ["OBJECTS", "SUFFIX", "TEMPORARY", "Objects", "checkpoint_of", "locked"]

_log = logging.getLogger(__name__)

OBJECTS = "objects"
TEMPORARY = "tmp"
SUFFIX = ".gist.safetensors"
_MAX_NAME = 1000  # characters of a checkpoint's name


class Objects:
    """The two directories of files in a store.

    Args:
        root: the store's directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> None:
        """Make the directories that are missing."""
        for folder in (OBJECTS, TEMPORARY):
            (self.root / folder).mkdir(exist_ok=True)
        sync_directory(self.root)

    def check(self) -> None:
        """Refuse directories that are missing, or are links.

        Raises:
            StoreError: one is missing or is not a directory.
        """
        for folder in (self.root / OBJECTS, self.root / TEMPORARY):
            if folder.is_symlink() or not folder.is_dir():
                raise StoreError(f"{folder} is missing, or is a link or file; it must be a directory of the store")

    def path(self, key: str) -> Path:
        """Return where the file of ``key`` is; the first two of its 64 digits name a directory."""
        return self.root / self.name(key)

    @staticmethod
    def name(key: str) -> str:
        """Return where the file of ``key`` is, relative to the store, with ``/``."""
        return f"{OBJECTS}/{key[:2]}/{key}{SUFFIX}"

    def size(self, key: str) -> int | None:
        """Return the size of the file of ``key``, or None if there is none. Links are not followed or counted."""
        try:
            if self.path(key).parent.is_symlink():
                return None
            found = os.lstat(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def place(self, files: dict[str, Path]) -> None:
        """Rename finished ``files``, by key, to where they belong. Call it with the index's write lock held.

        Once this returns, the renamed files also survive a power failure.

        Raises:
            StoreError: a link is in the place of a directory.
        """
        shards = {self.path(key).parent for key in files}
        new = [shard for shard in shards if not shard.is_dir()]
        for shard in new:
            shard.mkdir(exist_ok=True)
        if new:
            sync_directory(self.root / OBJECTS)
        if any(shard.is_symlink() for shard in shards):
            raise StoreError(f"{self.root / OBJECTS} holds a link in place of a directory; remove it")
        for key, file in files.items():
            os.replace(file, self.path(key))
        for shard in shards:
            sync_directory(shard)

    def remove(self, key: str) -> int:
        """Delete the file of ``key``, with the index's write lock held. Returns the bytes freed."""
        size = self.size(key)
        if size is None:
            return 0
        try:
            self.path(key).unlink()
        except OSError as error:
            _log.warning("%s cannot be deleted (%s); it stays until gc can delete it", self.path(key), error)
            return 0
        return size

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys that have a file."""
        for shard in sorted((self.root / OBJECTS).iterdir()):
            if shard.is_dir() and not shard.is_symlink():
                for file in sorted(os.listdir(shard)):
                    found = re.fullmatch(rf"([0-9a-f]{{64}}){re.escape(SUFFIX)}", file)
                    if found and found[1][:2] == shard.name:
                        yield found[1]

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Make a writer's directory, which is deleted when the block ends."""
        self.check()
        handle = None
        while handle is None:
            folder = Path(tempfile.mkdtemp(dir=self.root / TEMPORARY))
            # It is gone if a `stale` in between took it for that of a killed writer and removed it.
            try:
                handle = _lock(folder)
            except BaseException:  # such as too many open files
                folder.rmdir()
                raise
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def stale(self, *, is_removed: bool = False) -> dict[Path, int]:
        """Return what dead writers left, {path: bytes}, and delete it if ``is_removed``."""
        found: dict[Path, int] = {}
        for path in sorted((self.root / TEMPORARY).iterdir()):
            try:
                state = path.lstat()
            except FileNotFoundError:  # its writer has finished
                continue
            if not stat.S_ISDIR(state.st_mode):
                found[path] = state.st_size
                if is_removed:
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        _log.warning("%s cannot be deleted (%s)", path, error)
                        del found[path]
                continue
            try:
                handle = _lock(path, is_waiting=False)
            except OSError as error:
                _log.warning("%s cannot be opened (%s)", path, error)
                continue
            if handle is None:
                continue
            try:
                files = [file.lstat().st_size for file in path.rglob("*") if not file.is_dir()]
                # One without files may belong to a writer that has yet to lock it.
                if files or is_removed:
                    found[path] = sum(files)
                if is_removed:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                # A child that was forked meanwhile has the handle too, and would keep the lock.
                fcntl.flock(handle, fcntl.LOCK_UN)
                os.close(handle)
        return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of ``folder`` and hold it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_directory(folder: Path) -> None:
    """Make the names in a directory survive a power failure."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(folder: Path, *, is_waiting: bool = True) -> int | None:
    """Return an open, locked handle of a directory; None if it is gone, or is locked and ``is_waiting`` is false."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
        # It may have been removed between opening and locking.
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def checkpoint_of(path: Path) -> str:
    """Return the name of the checkpoint that made a file, "" if the file does not say it or cannot be read.

    Args:
        path: the file of an entry, of which only the header is read.
    """
    from gisting.storage import inspect  # which imports torch; completing a name on the command line does not

    try:
        name = inspect(path)["manifest"].get("checkpoint", "")
    except (OSError, CacheFormatError):
        return ""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= _MAX_NAME else ""
