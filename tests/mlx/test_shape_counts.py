"""Steps are sent exactly what the table of counts says (benchmarks/shape_counts.py)."""

from __future__ import annotations

import pytest
from benchmarks.shape_counts import ALL, RENEW, TESTED, counted, differences, stored

pytestmark = pytest.mark.timeout(300)


def test_no_step_and_no_draw_is_sent_more_or_less_than_was_meant() -> None:
    found = counted(TESTED)
    changed = differences(stored(), found)
    assert changed == [], f"if that was meant, renew the table: {RENEW}"


def test_the_table_has_all_contenders_and_what_they_were_given() -> None:
    table = stored()
    assert list(table) == list(ALL.loads)
    titles = {name: list(counts) for name, counts in table.items()}
    assert all(each == titles["metal"] for each in titles.values())
    assert len(titles["metal"]) == len(ALL.loads["metal"]) + 4  # draws


def test_a_count_that_differs_is_said() -> None:
    old = {"metal": {"1 row": {"nodes": 9, "kernels": 4}}}
    new = {"metal": {"1 row": {"nodes": 10, "kernels": 4}, "2 rows": {"nodes": 3}}}
    assert differences(old, old) == []
    assert differences(old, new) == [
        "metal, 1 row: nodes 9 -> 10",
        "metal, 2 rows: nodes None -> 3",
    ]
