"""Knows where things lie under the cache folder.

index-1.sqlite               one index for all namespaces, and so one limit
<namespace>/meta.json        what the namespace is, for people
<namespace>/tmp/             files that are being written
<namespace>/3f/3f….safetensors   a record by its name
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAMESPACE_DIGITS = 32
SHARDS = "0123456789abcdef"
SUFFIX = ".safetensors"
_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_RECORD = re.compile(r"([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whose state this is: nothing is shared between two digests.

    `digest` is made of all that decides what a state's bytes mean: model and weights, adapter,
    layout and quantisation, rank. `about` says the same for people.
    """

    digest: bytes
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return self.digest.hex()[:NAMESPACE_DIGITS].ljust(NAMESPACE_DIGITS, "0")


@dataclass(frozen=True, slots=True)
class CacheLayout:
    root: Path

    @property
    def index(self) -> Path:
        return self.root / "index-1.sqlite"

    def meta(self, namespace: str) -> Path:
        return self.root / namespace / "meta.json"

    def temporary_folder(self, namespace: str) -> Path:
        return self.root / namespace / "tmp"

    def temporary(self, namespace: str) -> Path:
        name = f"{os.getpid()}-{secrets.token_hex(8)}"
        return self.root.joinpath(namespace, "tmp", name)

    def shard(self, namespace: str, shard: str) -> Path:
        return self.root / namespace / shard

    def record(self, namespace: str, name: bytes) -> Path:
        return self.root.joinpath(namespace, shard_of(name), file_name_of(name))


def shard_of(name: bytes) -> str:
    return name[:1].hex()[0]


def file_name_of(name: bytes) -> str:
    return f"{name.hex()}{SUFFIX}"


def is_namespace(file_name: str) -> bool:
    return _NAMESPACE.fullmatch(file_name) is not None


def record_name(file_name: str) -> bytes | None:
    """Returns the name of the record in a file, or None where the file is not one of ours."""
    found = _RECORD.fullmatch(file_name)
    return bytes.fromhex(found.group(1)) if found else None
