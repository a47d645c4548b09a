"""What this device does with the engine, as a table that its owner can paste into an issue.

    python -m benchmarks device [--quick]

Prints Markdown and writes it to results/device-report.md: the device, the versions, whether each
way gives the same tokens, whether steps write K and V in place, how fast they are kept in 16 and in
8 bits, when forwards are submitted, and how long the device waits for the next. Names no folder, no
user and no host. Writes results/device-report.json.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec

from benchmarks import claims, machine, reaper
from benchmarks.claims import Claim
from benchmarks.device_child import Decode, Seen, Task, can_be_asked, without_folders
from benchmarks.models import VERSION, default_folder, ensure, ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from mlx_lm_server.config import Way

WAYS: tuple[Way, ...] = get_args(Way)
# Ways that compute on the CPU, whatever else there is.
CPU_WAYS = ("x86", "plain")
KV_BITS = (16, 8)
ROWS = (1, 8)
SUBMISSIONS = ("late", "early")
# What is kept longer than a step shows as a second copy: in place it is a few hundredths.
MOST_COPIED = 0.5
CHILD_TIMEOUT_S = 300

Row = tuple[str, str]


class Failure(msgspec.Struct, frozen=True):
    """Why an engine did not come to an answer, in its last line."""

    why: str


Look = Seen | Failure


class Sights(msgspec.Struct, frozen=True):
    """What engines showed: in the device's own way, treated as others, with K and V in so many
    bits, and with forwards submitted in each way that they know."""

    own: Look
    ways: dict[Way, Look]
    bits: dict[int, Look]
    submitted: dict[str, Look]


def report(effort: Effort) -> Findings:
    """A table about this device, to paste into an issue."""
    exact, small = str(ensure_models()["float32"]), str(_bfloat16_model())
    sights = look_around(effort, exact, small, look_at, has_submissions=can_be_asked("submission"))
    markdown = table_of(sights)
    claims.RESULTS.mkdir(exist_ok=True)
    path = claims.RESULTS / "device-report.md"
    path.write_text(markdown)
    print(markdown)
    console.print(f"to paste: benchmarks/results/{path.name}")
    return claims_of(sights), sights


def look_around(
    effort: Effort,
    exact: str,
    small: str,
    look: Callable[[Task], Look],
    *,
    has_submissions: bool,
) -> Sights:
    """Compares tokens with a model in float32, and times one in bfloat16."""
    rows = ROWS[-1:] if effort.is_quick else ROWS
    tokens = Task(exact, num_tokens=8 if effort.is_quick else 24)
    speed = Task(small, rows=rows, prompt_tokens=128 if effort.is_quick else 512)
    speed = msgspec.structs.replace(speed, num_steps=12 if effort.is_quick else 32)
    late = "late" if has_submissions else None
    own = look(tokens)
    return Sights(
        own=own,
        ways={way: look(msgspec.structs.replace(tokens, way=way)) for way in _others(own)},
        bits={
            kv_bits: look(msgspec.structs.replace(speed, kv_bits=kv_bits, submission=late))
            for kv_bits in KV_BITS
        },
        submitted={
            way: look(msgspec.structs.replace(speed, rows=rows[-1:], submission=way))
            for way in (SUBMISSIONS if has_submissions else ())
        },
    )


def _others(own: Look) -> list[Way]:
    return [way for way in WAYS if not isinstance(own, Seen) or way != own.way]


def look_at(task: Task) -> Look:
    command = [sys.executable, "-m", "benchmarks.device_child", msgspec.json.encode(task).decode()]
    child = reaper.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        printed, said = child.communicate(timeout=CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return Failure(f"no answer within {CHILD_TIMEOUT_S} s")
    if child.returncode == 0:
        return msgspec.json.decode(printed, type=Seen)
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    return Failure(f"ended with {child.returncode}: {without_folders(last)}")


def _bfloat16_model() -> Path:
    """Returns the folder of the model as GPUs are given it; built where it is not there."""
    path = default_folder() / f"qwen3-30m-v{VERSION}-bfloat16"
    ensure(path, partial(_write_bfloat16, ensure_models()["float32"]))
    return path


def _write_bfloat16(source: Path, path: Path) -> None:
    import json

    import mlx.core as mx

    weights = mx.load(str(source / "model.safetensors"))
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), halves, {"format": "mlx"})
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))


# ---- the table


def table_of(sights: Sights) -> str:
    """Returns the report in Markdown."""
    return _table(
        [
            *_about(sights.own),
            *_of_ways(sights.own, sights.ways),
            *_of_bits(sights.bits),
            *_of_submissions(sights.submitted),
        ]
    )


def _table(rows: Sequence[Row]) -> str:
    lines = [("what", "found"), ("---", "---"), *rows]
    return "".join(f"| {what} | {found.replace('|', '/')} |\n" for what, found in lines)


def _about(own: Look) -> list[Row]:
    facts = machine.facts()
    versions = {name: version for name, version in facts["versions"].items() if version}
    versions = {"Python": facts["python"], **versions}
    system = f"{facts['system']} {facts['machine']}, {facts['cpu']}, {facts['cores']} cores"
    load = f"load {facts['load_average_before']}"
    rows = [
        ("machine", f"{system}, {facts['memory_gb']} GB, {load}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    if isinstance(own, Failure):
        return [*rows, ("engine", own.why)]
    device = ", ".join(f"{name} {value}" for name, value in sorted(own.facts.items()))
    submission = f", submitted {own.submission}" if own.submission else ""
    way = f"{own.way} ({own.device}), {own.batching}{submission}"
    told = [("told at load", line) for line in own.told]
    return [*rows, ("device", device), ("own way", way), *told]


def _of_ways(own: Look, ways: dict[Way, Look]) -> list[Row]:
    return [(f"tokens, treated as {way}", _difference(own, look)) for way, look in ways.items()]


def _difference(own: Look, other: Look) -> str:
    if isinstance(other, Failure):
        return other.why
    if isinstance(own, Failure):
        return "nothing to compare with"
    total = sum(map(len, own.tokens))
    equal = _num_equal(own, other)
    return f"the same {total}" if equal == total else f"{equal} of {total} before they differ"


def _num_equal(own: Seen, other: Seen) -> int:
    """Returns how many tokens are the same, up to the first of each answer that is not."""
    num_equal = 0
    for ours, theirs in zip(own.tokens, other.tokens, strict=True):
        pairs = list(zip(ours, theirs, strict=False))
        num_equal += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return num_equal


def _of_bits(bits: dict[int, Look]) -> list[Row]:
    rows: list[Row] = []
    for kv_bits, look in bits.items():
        if isinstance(look, Failure):
            rows.append((f"K and V in {kv_bits} bits", look.why))
            continue
        title = f"K and V in {kv_bits} bits ({look.kv_format}; weights {look.weights})"
        rows.append((title, ", ".join(map(_speed, look.decodes))))
        rows += [
            (f"… {_rows(decode)}: memory of a step", _memory(decode)) for decode in look.decodes
        ]
        rows += [(f"… {_rows(decode)}: between steps", _gap(decode)) for decode in look.decodes]
    return rows


def _of_submissions(submitted: dict[str, Look]) -> list[Row]:
    """Returns the speed of each way to submit; nothing where an engine knows of one only, and no
    speed where one is not to be had on this device."""
    rows: list[Row] = []
    for asked, look in submitted.items():
        if isinstance(look, Failure):
            rows.append((f"submitted {asked}", look.why))
            continue
        is_done = (look.submission or "").startswith(asked)
        speeds = ", ".join(map(_speed, look.decodes)) if is_done else "not in this way"
        rows.append((f"asked to submit {asked} (is: {look.submission})", speeds))
    return rows


def _rows(decode: Decode) -> str:
    return f"{decode.num_rows} row{'s' * (decode.num_rows > 1)}"


def _speed(decode: Decode) -> str:
    return f"{_rows(decode)}: {decode.tokens_per_s:.1f} tok/s"


def _memory(decode: Decode) -> str:
    share = copied(decode)
    place = "in place" if share < MOST_COPIED else "COPIED, not in place"
    return f"{share:.2f} of {decode.slab_bytes / 2**20:.0f} MiB of slabs: {place}"


def _gap(decode: Decode) -> str:
    gap_ms, submit_ms, step_ms = (
        1000 * seconds for seconds in (decode.gap_s, decode.submit_s, decode.step_s)
    )
    return f"{gap_ms:.2f} ms to the next submission, {submit_ms:.2f} ms in it, of {step_ms:.2f} ms"


def copied(decode: Decode) -> float:
    """Returns what a step takes beyond what is held, over its slabs."""
    return decode.peak_bytes / max(1, decode.slab_bytes)


# ---- what has to hold


def claims_of(sights: Sights) -> list[Claim]:
    """Returns what has to hold of a device, and what is only shown."""
    return [*_way_claims(sights.own, sights.ways), *_bits_claims(sights.bits)]


def _way_claims(own: Look, ways: dict[Way, Look]) -> list[Claim]:
    """Tokens of ways on one device have to be the same; those of a GPU and a CPU may differ where
    two of them are as likely."""
    made = [Claim("engines that failed", _num_failed([own, *ways.values()]), at_most=0)]
    if isinstance(own, Failure):
        return made
    total = sum(map(len, own.tokens))
    for way, look in ways.items():
        if isinstance(look, Seen):
            is_same_device = own.way in CPU_WAYS or way not in CPU_WAYS
            share = _num_equal(own, look) / total
            bound = 1.0 if is_same_device else None
            made.append(Claim(f"tokens treated as {way}, that are its own", share, at_least=bound))
    return made


def _bits_claims(bits: dict[int, Look]) -> list[Claim]:
    made = [Claim("engines of K and V in bits that failed", _num_failed(bits.values()), at_most=0)]
    for kv_bits, look in bits.items():
        for decode in look.decodes if isinstance(look, Seen) else ():
            name = f"{kv_bits} bits, {_rows(decode)}"
            bound = MOST_COPIED if kv_bits == 16 else None
            made.append(
                Claim(f"{name}: memory of a step over slabs", copied(decode), at_most=bound)
            )
            made.append(Claim(f"{name}: decode", decode.tokens_per_s, unit="tok/s"))
    return made


def _num_failed(looks: Iterable[Look]) -> int:
    return sum(isinstance(look, Failure) for look in looks)


PARTS = {"report": report}


if __name__ == "__main__":
    raise SystemExit(run_parts("device", PARTS, __doc__))
