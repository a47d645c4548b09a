"""Which tests observe the effect of which field: `@observes("ChatRequest.n")` on the test.

As a pytest plugin (`-p tests.observations --collect-only`) it prints them, as the tests that are
really there say it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pytest

LINE = "observed"


def observes(*names: str) -> pytest.MarkDecorator:
    """`names` are `Class.field` of a request's or of the configuration's classes."""
    return pytest.mark.observes(*names)


def observed(cls: str, names: Iterable[str]) -> list[Any]:
    """Parameters, each of which observes the field of its name."""
    return [pytest.param(name, marks=observes(f"{cls}.{name}")) for name in names]


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if item.get_closest_marker("skip") is not None:
            continue
        for mark in item.iter_markers("observes"):
            for name in mark.args:
                says = _is_named(name.partition(".")[2], item)
                print(LINE, name, "named" if says else "unnamed", item.nodeid)


def _is_named(field: str, item: pytest.Item) -> bool:
    """Whether the test's file has the field's name, or its flag, at all."""
    assert isinstance(item, pytest.Function)
    source = inspect.getsource(inspect.getmodule(item.obj))  # type: ignore[arg-type]
    words = source.replace(f".{field}", "")  # without the marks themselves
    return any(name in words for name in (field, "--" + field.replace("_", "-")))
