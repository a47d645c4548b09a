"""A tier in memory."""

from __future__ import annotations

from mlx_lm_server.tier import Record


class KeptRecords:
    """Keeps in `all` what is offloaded, in its order."""

    def __init__(self) -> None:
        self.all: list[Record] = []

    def save(self, record: Record) -> None:
        self.all.append(record)

    def found(self, name: bytes) -> Record:
        return next(record for record in self.all if record.name == name)
