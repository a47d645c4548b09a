"""What the run against the newest mlx-lm says of its tests and of the table of models."""

from __future__ import annotations

from .models_table import HEAD, Row
from .newest import TABLE, Served, differences, failures, read_table

REPORT = """<testsuites><testsuite>
<testcase name="test_a_rotating_cache_states_its_window"/>
<testcase name="test_models_ask[gemma2]">
<failure message="AssertionError: gemma2 asks no more&#10;assert 1 == 2">a traceback</failure>
</testcase>
<testcase name="tests.mlx"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


def test_each_failed_test_is_a_sentence() -> None:
    assert list(failures(REPORT)) == [
        "models ask[gemma2]: gemma2 asks no more",
        "tests.mlx: collection failure",
    ]


def test_the_table_is_read_as_it_is_written() -> None:
    rows = [Row("a", "packed", "full KV", ""), Row("b", "alone", "its own", "x | y: z")]
    text = "\n".join([HEAD.format(version="1"), *map(str, rows)])
    assert read_table(text) == {
        "a": Served("packed", "full KV", ""),
        "b": Served("alone", "its own", r"x \| y: z"),
    }


def test_the_table_in_the_docs_knows_the_families() -> None:
    table = read_table(TABLE.read_text())
    assert len(table) > 100
    assert table["llama4"].way == "alone"
    assert all(served.reason for served in table.values() if served.way in ("alone", "not loaded"))


def test_what_moved_in_the_table_is_a_sentence_each() -> None:
    full, state = Served("packed", "full KV", ""), Served("split", "state", "it has state")
    before = {"gone": full, "kept": full, "worse": full, "better": state, "other": full}
    now = {"kept": full, "worse": state, "better": full, "other": Served("packed", "a window", "")}
    now["new"] = state
    assert list(differences(before, now)) == [
        (False, "better was split and is packed now"),
        (True, "gone is gone"),
        (False, "new is new: split, because it has state"),
        (False, "other kept full KV and keeps a window now"),
        (True, "worse was packed and is split now, because it has state"),
    ]
