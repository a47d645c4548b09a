"""Where the server keeps what it can make again, also for a user whom the system does not know: in
a container a user id may have neither HOME nor an entry in /etc/passwd.

The first of these that can be written to: $XDG_CACHE_HOME, .cache in $HOME, .cache in the home of
the entry, and a folder of the user's own below the system's temporary one.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_lm_server.errors import ConfigError

NAME = "mlx-lm-server"
ONLY_MINE = 0o700


def cache_folder() -> Path:
    """Holds the compiled code and the disk tier; only the temporary one is made here. Raises
    ConfigError where that one is somebody else's, since what lies there is run."""
    found = next(filter(_can_be_written, _usual_folders()), None)
    return found / NAME if found is not None else _temporary_folder()


def nearest_existing(folder: Path) -> Path:
    """Returns the folder, or the first of those around it that is there."""
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def expanded(path: str) -> Path:
    """`~` as the shell reads it. Raises ConfigError where no home is known."""
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path and not os.path.exists(path):
        raise ConfigError(f"{path}: no home folder is known for `~`; give the whole path")
    return Path(found)


def name_for_hub() -> None:
    """Tells the hub's library, here and in processes to come, where downloads go, if it would take
    `~` for the name of a folder. Raises ConfigError."""
    if os.path.expanduser("~") == "~":
        os.environ.setdefault("HF_HOME", str(cache_folder() / "huggingface"))


def _usual_folders() -> Iterator[Path]:
    """A path that is not absolute is none (XDG's own rule)."""
    for root, inside in (
        (os.environ.get("XDG_CACHE_HOME"), "."),
        (os.environ.get("HOME"), ".cache"),
        (_home_of_entry(), ".cache"),
    ):
        if root and os.path.isabs(root):
            yield Path(root) / inside


def _home_of_entry() -> str | None:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def _can_be_written(folder: Path) -> bool:
    """Whether it is there, or can be made, and so with what goes into it."""
    folder = folder / NAME
    nearest = nearest_existing(folder)
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    uid = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"{NAME}-{uid}"
    try:
        folder.mkdir(mode=ONLY_MINE, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; set XDG_CACHE_HOME") from error
    is_mine = stat.S_ISDIR(found.st_mode) and found.st_uid == uid
    if not is_mine or stat.S_IMODE(found.st_mode) != ONLY_MINE:
        raise ConfigError(f"{folder} is not only for user {uid}; set XDG_CACHE_HOME")
    return folder
