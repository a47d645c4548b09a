"""The API keys: one from the configuration, more from a file that can be read again."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from mlx_lm_server.errors import ConfigError
from mlx_lm_server.folders import expanded

log = logging.getLogger(__name__)


class ApiKeys:
    """Knows keys by their digest; comparing takes the same time whatever is given."""

    def __init__(self, key: str | None, file: str | None) -> None:
        """Raises ConfigError where the file cannot be read or has no key."""
        self._key = key
        self._file = expanded(file) if file is not None else None
        self._names: dict[bytes, str] = {}
        self._load()

    @property
    def is_required(self) -> bool:
        return bool(self._names)

    def name_of(self, key: bytes) -> str | None:
        """The name of a valid key, else None."""
        given = _digest(key)
        found = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, given):
                found = name
        return found

    def reload(self) -> None:
        """Reads the file again; where that fails the old keys stay."""
        try:
            self._load()
        except ConfigError as error:
            log.error("%s; the old keys stay", error)
        else:
            log.info("%d API keys in use", len(self._names))

    def _load(self) -> None:
        names = {} if self._key is None else {_digest(self._key.encode()): "default"}
        if self._file is not None:
            names.update(_read(self._file))
        self._names = names


def _read(file: Path) -> dict[bytes, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
    names: dict[bytes, str] = {}
    for line in lines:
        words = line.split(maxsplit=1)
        if words and not words[0].startswith("#"):
            digest = _digest(words[0].encode())
            names[digest] = words[1].strip() if len(words) > 1 else f"key-{digest.hex()[:8]}"
    if not names:
        raise ConfigError(f"--api-key-file {file} holds no key")
    return names


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
