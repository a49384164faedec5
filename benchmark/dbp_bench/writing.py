"""Files and folders that are written whole or not at all, and locks between commands."""

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from dbp_bench.errors import BadRequest

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Busy(BadRequest):
    """Another command is at work there."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError inside name `path`, where it names no file: a full disk says it without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sweep(path: Path) -> None:
    """Remove what commands that were killed have left in place of `path`, half written."""
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        number = re.match(r"(\d+)\.", left.name.removeprefix(f".{path.name}."))
        if number is None or _is_running(int(number[1])):
            continue
        with suppress(OSError):  # another command may be sweeping, too
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's
    return True


@contextmanager
def scratch_folder(what: str) -> Iterator[Path]:
    """A folder for as long as it is needed; those that killed commands left are removed first.

    Args:
        what: The purpose of the folder, which is in its name.
    """
    sweep(Path(gettempdir()) / what)
    with TemporaryDirectory(prefix=f".{what}.{os.getpid()}.", suffix=".tmp") as folder:
        yield Path(folder).resolve()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file to write, which takes the place of `path` at the end, if all goes well.

    A reader, or a crash, finds the old file or the new one.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        # One name per process: two writers must not share a half-written file.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, finds the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_together(
    folder: Path, files: Mapping[str, str | bytes], *, with_folders: bool = False
) -> None:
    """Write `files`, by name, into `folder` so that a crash leaves all old files or all new ones.

    They are written into a new folder, with links to the files that stay, and the two folders are
    swapped. Where that can't be done, as with the folder that the user is in, each file is replaced
    by itself.

    Args:
        folder: The folder.
        files: Contents by name, or by path in the folder.
        with_folders: True if the folders in it belong to it and are swapped, too. Otherwise a
            folder that has any is not swapped.
    """
    folder = folder.resolve()
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(made, ignore_errors=True)
        try:
            if not _can_swap(folder, with_folders):
                raise PermissionError
            made.mkdir()
        except PermissionError:
            _replace_each(folder, files)
            return
        try:
            for name, content in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                with (made / name).open("wb") as file:
                    file.write(content.encode() if isinstance(content, str) else content)
                    file.flush()
                    os.fsync(file.fileno())
            if not folder.exists():
                made.rename(folder)
                return
            _link_missing(folder, made)
            shutil.copymode(folder, made)
            if _exchange(made, folder):
                _link_missing(made, folder)  # what others wrote meanwhile
            else:
                _replace_each(folder, files)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _link_missing(source: Path, target: Path) -> None:
    """Link what is in `source`, and not in `target`, into that."""
    for old in sorted(source.rglob("*")):
        new = target / old.relative_to(source)
        if old.is_dir() and not old.is_symlink():
            new.mkdir(exist_ok=True)
        elif not new.exists():
            with suppress(FileNotFoundError):  # another command's, written and moved meanwhile
                os.link(old, new, follow_symlinks=False)


def _can_swap(folder: Path, with_folders: bool) -> bool:
    """True if nothing is lost when another folder takes the place of this one."""
    if not folder.exists():
        return True
    folders = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return (
        not Path.cwd().is_relative_to(folder)
        and not folder.is_mount()
        and (with_folders or not folders)
    )


def _replace_each(folder: Path, files: Mapping[str, str | bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


@contextmanager
def locked(place: Path, *, what: str, wait: bool = False) -> Iterator[None]:
    """Keep a second command away from `place` while this one is at work there.

    Args:
        place: A file or folder; the lock lies beside it.
        what: The work that goes on there, for the message.
        wait: True to wait until it is free.

    Raises:
        Busy: Another command is at work there.
    """
    lock = place.with_name(f"{place.name}.lock")
    with naming(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise Busy(f"{place}: another {what} is at work there.") from None
        yield
