"""What a GPU would be sent in a step, counted on any machine: ours beside mlx-lm's BatchGenerator.

    python -m benchmarks shape [counts decode mixed sampling slabs] [--quick]

The engine goes the way of each device, and one counter counts both sides: nodes of the graphs that
are submitted, kernels (nodes that are no views), submissions, bytes of K and V that attention is
given, and the time that the engine's thread takes to plan, build and submit. From run to run only
that time differs, and a little how long rows of different lengths have become. What a layer takes
is the difference of two models. Writes results/shape-PART.json, and `counts` also the table of
exact counts that a test holds steps against (shape_counts.json): run it where a change was meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from benchmarks import shape_counts
from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.shape_child import Load, Shape, Task
from benchmarks.shape_counts import THEIRS
from benchmarks.shape_models import LAYERS
from benchmarks.shape_runs import measured, title_of
from benchmarks.shape_slabs import slabs

OURS = ("metal-16", "metal-8", "cuda-16", "cuda-8", "plain-16", "plain-8")
DECODES = [Load(1), Load(8), Load(8, is_ragged=True), Load(32), Load(32, is_ragged=True)]
MIXED = [Load(n, has_chunk=True) for n in (1, 8, 32)]
DRAWS = [Load(n, sampling=kind) for n in (8, 32) for kind in ("greedy", "top-p", "penalties")]

# Of a step, then of each of its layers, then of the step again.
COLUMNS = ("nodes", "kernels", "/ layer", "kernels", "attends", "submits", "KV KiB", "host ms")


class Bounds(NamedTuple):
    """Nodes a layer: of rows of equal and of different lengths, which lie in three slabs, and with
    a chunk beside them."""

    equal: int
    different: int
    with_chunk: int


# What was counted, so that growth is seen.
NODES_A_LAYER = {
    "metal-16": Bounds(59, 97, 87),
    "metal-8": Bounds(93, 199, 141),
    "cuda-16": Bounds(59, 97, 87),
    "cuda-8": Bounds(87, 181, 135),
    "plain-16": Bounds(59, 97, 87),
    "plain-8": Bounds(105, 235, 171),
}
# Of a step beyond one of greedy rows.
TOP_P_KERNELS = {"metal-16": 66, "cuda-16": 66, "plain-16": 97}
PENALTY_KERNELS_A_ROW = 13


class Layer(msgspec.Struct, frozen=True):
    """What one layer more takes of a step."""

    nodes: float
    kernels: float
    names: dict[str, float]


def decode(effort: Effort) -> Findings:
    """A decode step: of 1, 8 and 32 rows, of equal and of different lengths."""
    return _by_layer(DECODES[:2] if effort.is_quick else DECODES)


def mixed(effort: Effort) -> Findings:
    """A step with a chunk of a prompt beside 1, 8 and 32 rows that decode."""
    return _by_layer(MIXED[:1] if effort.is_quick else MIXED)


def _by_layer(loads: list[Load]) -> Findings:
    found = measured((*OURS, THEIRS), Task(LAYERS, loads))
    claims = []
    for load in loads:
        _print_heading(load)
        layers = {name: _layer(shapes, load) for name, shapes in found.items()}
        for name, layer in layers.items():
            _print(name, _shape(found[name], load, max(LAYERS)), layer)
        for name in OURS:
            _print_difference(name, layers[name], layers[THEIRS])
            title = f"{name}, {title_of(load)}: nodes a layer"
            claims.append(Claim(title, layers[name].nodes, at_most=_bound(name, load)))
    return claims, found


def _bound(name: str, load: Load) -> float:
    bounds = NODES_A_LAYER[name]
    if load.has_chunk:
        return bounds.with_chunk
    return bounds.different if load.is_ragged else bounds.equal


def sampling(effort: Effort) -> Findings:
    """What top-p and penalties add to a step of greedy rows."""
    names = (*(name for name in OURS if name.endswith("-16")), THEIRS)
    loads = DRAWS[:3] if effort.is_quick else DRAWS
    found = measured(names, Task(LAYERS[:1], loads))
    claims = []
    for load in loads:
        _print_heading(load)
        greedy = msgspec.structs.replace(load, sampling="greedy")
        for name, shapes in found.items():
            shape, plain = (_shape(shapes, which, LAYERS[0]) for which in (load, greedy))
            _print(name, shape, None)
            if load != greedy:
                title = f"{name}, {title_of(load)}: kernels more than greedy"
                more = shape.kernels - plain.kernels
                claims.append(Claim(title, more, at_most=_draw_bound(name, load)))
    return claims, found


def counts(effort: Effort) -> Findings:
    """What whole steps and draws take, exactly, for each way beside mlx-lm's; renews the table."""
    found = shape_counts.counted(shape_counts.TESTED if effort.is_quick else shape_counts.ALL)
    console.print(shape_counts.shown(found), soft_wrap=True)
    for line in shape_counts.differences(shape_counts.stored(), found):
        console.print(f"  {line}", soft_wrap=True)
    if not effort.is_quick:
        shape_counts.store(found)
    claims = []
    for name in shape_counts.WAYS:
        for title, bound in shape_counts.DRAW_KERNELS.items():
            kernels = found[name][title]["kernels"]
            claims.append(Claim(f"{name}, {title}: kernels", kernels, at_most=bound))
    return claims, found


def _draw_bound(name: str, load: Load) -> int | None:
    if name == THEIRS:
        return None
    if load.sampling == "penalties":
        return PENALTY_KERNELS_A_ROW * load.num_rows
    return TOP_P_KERNELS[name]


def _shape(shapes: Sequence[Shape], load: Load, num_layers: int) -> Shape:
    return next(s for s in shapes if s.load == load and s.num_layers == num_layers)


def _layer(shapes: Sequence[Shape], load: Load) -> Layer:
    few, many = LAYERS
    less, more = (_shape(shapes, load, num_layers) for num_layers in LAYERS)
    names = Counter(more.names)
    names.subtract(less.names)
    return Layer(
        nodes=(more.nodes - less.nodes) / (many - few),
        kernels=(more.kernels - less.kernels) / (many - few),
        names={name: count / (many - few) for name, count in names.items() if count},
    )


def _print_heading(load: Load) -> None:
    console.print(f"  {title_of(load)}")
    _print_cells("", COLUMNS)


def _print(name: str, shape: Shape, layer: Layer | None) -> None:
    of_layer = ("", "") if layer is None else (f"{layer.nodes:g}", f"{layer.kernels:g}")
    attends = f"{shape.num_attentions / shape.num_layers:g}"
    kib, host_ms = f"{shape.kv_bytes / 1024:.0f}", f"{shape.host_ms:.1f}"
    step = (str(shape.nodes), str(shape.kernels))
    _print_cells(name, (*step, *of_layer, attends, str(shape.submissions), kib, host_ms))


def _print_cells(name: str, cells: Sequence[str]) -> None:
    line = "".join(f"{cell:>9}" for cell in cells)
    console.print(f"  {name:9}{line}", soft_wrap=True)


def _print_difference(name: str, ours: Layer, theirs: Layer) -> None:
    """Returns the operations of which a layer of ours has more or fewer than one of mlx-lm's."""
    names = sorted({*ours.names, *theirs.names})
    more = {each: ours.names.get(each, 0) - theirs.names.get(each, 0) for each in names}
    told = "  ".join(f"{each} {number:+g}" for each, number in more.items() if number)
    console.print(f"  {name:9} a layer beside {THEIRS}: {told or 'the same'}", soft_wrap=True)


PARTS = {
    "counts": counts,
    "decode": decode,
    "mixed": mixed,
    "sampling": sampling,
    "slabs": slabs,
}


if __name__ == "__main__":
    raise SystemExit(run_parts("shape", PARTS, __doc__))
