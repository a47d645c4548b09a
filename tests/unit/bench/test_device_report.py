"""What the report about a device says of what was seen."""

from __future__ import annotations

import logging
import platform
import sys
from pathlib import Path

from benchmarks import device, device_child
from benchmarks.claims import Claim
from benchmarks.device import Failure, Look
from benchmarks.device_child import Decode, Seen, Task
from benchmarks.parts import Effort

MIB = 1 << 20
IN_PLACE = Decode(8, 80.0, 0.1, 0.0005, 0.002, peak_bytes=2 * MIB, slab_bytes=100 * MIB)
COPIED = Decode(8, 40.0, 0.2, 0.0005, 0.002, peak_bytes=100 * MIB, slab_bytes=100 * MIB)


def seen(way: str = "metal", tokens: tuple[int, ...] = (1, 2, 3, 4), **more: object) -> Seen:
    usual: dict[str, object] = {
        "way": way,
        "device": "Apple M2",
        "kv_format": "bfloat16",
        "weights": "bfloat16",
        "batching": "packed",
        "submission": None,
        "facts": {"device_name": "Apple M2", "memory_size": 17179869184},
        "told": ["qwen3 runs packed"],
        "tokens": [[7, 8], list(tokens)],
        "decodes": [],
    }
    return Seen(**{**usual, **more})


class Engines:
    """Gives what each task is to see, and keeps the tasks."""

    def __init__(self, own: Look, **ways: Look) -> None:
        self._own, self._ways = own, ways
        self.decode, self.goes_early = IN_PLACE, True
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> Look:
        self.tasks.append(task)
        if task.rows:
            bits, submission = (
                f"{task.kv_bits} bits",
                task.submission if self.goes_early else "late",
            )
            return seen(kv_format=bits, decodes=[self.decode], submission=submission)
        return self._own if task.way is None else self._ways.get(task.way, self._own)


def reported(engines: Engines, *, has_submissions: bool = False) -> tuple[list[Claim], str]:
    """Returns the claims and the Markdown of a report over such engines."""
    effort = Effort(is_quick=True, rounds=1)
    sights = device.look_around(effort, "exact", "small", engines, has_submissions=has_submissions)
    return device.claims_of(sights), device.table_of(sights)


def missed(made: list[Claim]) -> list[str]:
    return [claim.name for claim in made if not claim.holds]


def test_it_is_a_table_with_all_that_was_asked_for() -> None:
    engines = Engines(seen())
    made, markdown = reported(engines)
    lines = markdown.splitlines()
    assert lines[1] == "| --- | --- |"
    assert all(line.count("|") == 3 for line in lines)
    for words in (
        "Apple M2",
        "memory_size 17179869184",
        f"Python {platform.python_version()}",
        "| own way | metal (Apple M2), packed |",
        "| told at load | qwen3 runs packed |",
        "| tokens, treated as cuda | the same 6 |",
        "| K and V in 8 bits (8 bits; weights bfloat16) | 8 rows: 80.0 tok/s |",
        "0.02 of 100 MiB of slabs: in place",
        "0.50 ms to the next submission, 2.00 ms in it, of 100.00 ms",
    ):
        assert words in markdown
    assert missed(made) == []
    assert {task.kv_bits for task in engines.tasks} == {16, 8}


def test_it_names_no_folder_no_user_and_no_host(tmp_path: Path) -> None:
    with device_child.logged() as told:
        logging.getLogger(device_child.TELLS).info("%s holds %s", Path.home(), "a model")
    assert told == ["… holds a model"]
    look = device.look_at(Task(str(tmp_path / "none")))
    assert isinstance(look, Failure)
    assert look.why.startswith("ended with 1: mlx_lm_server.errors.")
    _, markdown = reported(Engines(seen(told=told), cuda=look))
    assert look.why in markdown
    names = [str(tmp_path), str(Path.home()), str(Path.cwd()), platform.node(), sys.executable]
    assert not [name for name in names if name in markdown]


def test_tokens_that_differ_are_told_from_where_on() -> None:
    made, markdown = reported(Engines(seen(), cuda=seen("cuda", tokens=(1, 2, 9, 4))))
    assert "| tokens, treated as cuda | 4 of 6 before they differ |" in markdown
    assert missed(made) == ["tokens treated as cuda, that are its own"]


def test_a_gpu_and_a_cpu_may_draw_other_tokens() -> None:
    made, _ = reported(Engines(seen(), plain=seen("plain", tokens=(1, 2, 9, 4))))
    assert missed(made) == []
    own = seen("x86")
    made, _ = reported(Engines(own, metal=seen("metal", tokens=(1, 2, 9, 4))))
    assert missed(made) == ["tokens treated as metal, that are its own"]


def test_what_is_copied_is_told() -> None:
    engines = Engines(seen())
    engines.decode = COPIED
    made, markdown = reported(engines)
    assert "1.00 of 100 MiB of slabs: COPIED" in markdown
    assert missed(made) == ["16 bits, 8 rows: memory of a step over slabs"]


def test_an_engine_that_fails_is_told_and_the_others_too() -> None:
    made, markdown = reported(Engines(seen(), cuda=Failure("ended with 1: no device")))
    assert "| tokens, treated as cuda | ended with 1: no device |" in markdown
    assert "| tokens, treated as plain | the same 6 |" in markdown
    assert missed(made) == ["engines that failed"]
    made, markdown = reported(Engines(Failure("ended with 1: no MLX")))
    assert "| engine | ended with 1: no MLX |" in markdown
    assert "engines that failed" in missed(made)


def test_both_ways_to_submit_are_shown_where_engines_know_them() -> None:
    _, markdown = reported(Engines(seen()))
    assert "submit " not in markdown
    engines = Engines(seen(submission="early"))
    _, markdown = reported(engines, has_submissions=True)
    assert "packed, submitted early |" in markdown
    assert "| asked to submit late (is: late) | 8 rows: 80.0 tok/s |" in markdown
    assert "| asked to submit early (is: early) | 8 rows: 80.0 tok/s |" in markdown
    engines.goes_early = False
    assert "(is: late) | not in this way |" in reported(engines, has_submissions=True)[1]
    timed = [task.submission for task in engines.tasks if task.rows][:4]
    assert timed == ["late", "late", "late", "early"], "gaps are those of late steps"
