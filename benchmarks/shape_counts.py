"""The exact counts of steps and draws, as a table that is kept: `shape_counts.json`.

    python -m benchmarks shape counts

writes it anew. A test counts some of them again, so that no step is sent more without being meant
to. Of a model with two layers; a contender's numbers differ from another's by what it is, not by
how fast a machine is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.shape_child import EVENT_STEPS, Load, Shape, Task
from benchmarks.shape_draws import NUM_ROWS, Draws
from benchmarks.shape_runs import child_of, counted_at_once, printed_by, title_of

TABLE = Path(__file__).with_name("shape_counts.json")
RENEW = "python -m benchmarks shape counts"

WAYS = ("metal", "cuda")
THEIRS = "mlx-lm"
NUM_LAYERS = 2
EVENTS = [Load(8, event="leaving"), Load(8, event="growing")]
CHUNKS = [Load(n, has_chunk=True) for n in (1, 8, 32)]
RAGGED = [Load(8, is_ragged=True), Load(32, is_ragged=True)]
LOADS = [Load(1), Load(8), Load(32), *RAGGED, *CHUNKS, *EVENTS]
# Quickly counted, and each way of being sent more is in them.
QUICK_LOADS = [Load(1), Load(8), Load(8, is_ragged=True), Load(8, has_chunk=True), *EVENTS]
COLUMNS = (
    "nodes", "kernels", "attends", "submits", "waits", "kv_bytes", "written_bytes", "copied_bytes",
)  # fmt: skip

Counted = dict[str, dict[str, dict[str, int]]]  # by contender, title and column


@dataclass(frozen=True, slots=True)
class Selection:
    """Which contenders' steps and draws are counted."""

    loads: Mapping[str, Sequence[Load]]

    @property
    def tasks(self) -> dict[str, Task]:
        return {
            _contender(name): Task((NUM_LAYERS,), list(loads), is_timed=False)
            for name, loads in self.loads.items()
        }


ALL = Selection(dict.fromkeys((*WAYS, THEIRS), LOADS))
TESTED = Selection({"metal": QUICK_LOADS, "cuda": QUICK_LOADS[1:3]})


def _contender(name: str) -> str:
    return name if name == THEIRS else f"{name}-16"


def _draw_title(kind: str) -> str:
    return f"draw of {NUM_ROWS} rows, {kind}"


# What a draw over 152k tokens may take at most.
DRAW_KERNELS = {_draw_title("greedy"): 3, _draw_title("penalties"): 40}


def counted(selection: Selection) -> Counted:
    draws = {name: child_of("benchmarks.shape_draws", name) for name in selection.loads}
    shapes = counted_at_once(selection.tasks)
    found: Counted = {}
    for name, child in draws.items():
        found[name] = {title_of(s.load): _numbers(s) for s in shapes[_contender(name)]}
        for draw in msgspec.json.decode(printed_by(child), type=list[Draws]):
            found[name][_draw_title(draw.kind)] = _numbers(draw)
    return found


def _numbers(counts: Shape | Draws) -> dict[str, int]:
    about: dict[str, Any] = msgspec.structs.asdict(counts)
    about |= {"submits": about.get("submissions"), "attends": about.get("num_attentions")}
    return {name: about[name] for name in COLUMNS if about.get(name) is not None}


def stored() -> Counted:
    return msgspec.json.decode(TABLE.read_bytes(), type=Counted) if TABLE.exists() else {}


def store(found: Counted) -> None:
    TABLE.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def differences(old: Counted, new: Counted) -> list[str]:
    """Returns what of the new counts is otherwise in the old ones, in words."""
    return [
        f"{name}, {title}: {column} {old.get(name, {}).get(title, {}).get(column)} -> {number}"
        for name, titles in new.items()
        for title, numbers in titles.items()
        for column, number in numbers.items()
        if old.get(name, {}).get(title, {}).get(column) != number
    ]


def shown(found: Counted) -> str:
    """Returns the counts as a table, those of a title side by side."""
    lines = [f"events are counted over {EVENT_STEPS} steps", _line("", "", COLUMNS)]
    titles = dict.fromkeys(title for of_name in found.values() for title in of_name)
    for title in titles:
        for name in found:
            if (numbers := found[name].get(title)) is not None:
                cells = [str(numbers.get(column, "")) for column in COLUMNS]
                lines.append(_line(title, name, cells))
    return "\n".join(lines)


def _line(title: str, name: str, cells: Sequence[str]) -> str:
    return f"  {title:32}{name:8}" + "".join(f"{cell:>14}" for cell in cells)
