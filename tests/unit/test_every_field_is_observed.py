"""Nothing is accepted and ignored: each field of a request and each setting is named by a test that
observes its effect. The lists come from the code, the observations from the tests as collected."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.observations import LINE

from mlx_lm_server.config import Config
from mlx_lm_server.server.protocols.openai import schema, text_schema

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]
# Parts that others share; their fields are those of the others.
BASES = {"Sampling", "Rendering"}


def bodies(base: type[schema.Body] = schema.Body) -> Iterator[type[schema.Body]]:
    for one in base.__subclasses__():
        yield one
        yield from bodies(one)


def all_fields() -> set[str]:
    assert text_schema  # imported so that its classes are known
    found = {
        f"{body.__name__}.{name}"
        for body in bodies()
        if body.__name__ not in BASES
        for name in body.model_fields
    }
    for section in dataclasses.fields(Config):
        settings = type(getattr(Config(), section.name))
        found |= {f"{settings.__name__}.{one.name}" for one in dataclasses.fields(settings)}
    return found


@pytest.fixture(scope="module")
def observations() -> list[list[str]]:
    """[field, named or unnamed, test] of all files that say so."""
    tests = (ROOT / "tests").rglob("test_*.py")
    files = [str(file) for file in tests if "observes(" in file.read_text()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.observations", "--collect-only", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    lines = (line.split(" ", 3) for line in done.stdout.splitlines())
    return [parts[1:] for parts in lines if parts[0] == LINE]


def test_every_field_is_observed_by_a_test(observations: list[list[str]]) -> None:
    assert sorted(all_fields() - {name for name, _, _ in observations}) == []


def test_only_fields_that_exist_are_observed(observations: list[list[str]]) -> None:
    assert sorted({name for name, _, _ in observations} - all_fields()) == []


def test_who_observes_a_field_speaks_of_it(observations: list[list[str]]) -> None:
    assert [line for line in observations if line[1] == "unnamed"] == []
