"""When a C compiler is called, and when it is not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mlx_lm_server import native
from mlx_lm_server.native import compiler
from mlx_lm_server.native.compiler import FAILURE_COUNTS_S, Compiler, Failure

# A program that notes each call, and does the rest.
PROGRAM = """#!/bin/sh
echo "$0" >> "{calls}"
{rest}
"""
# What `-o FILE` names is made.
SUCCEEDS = 'while [ "$1" != "-o" ]; do shift; done; : > "$2"'
FAILS = "echo 'fatal error: stdlib.h: No such file or directory' >&2; exit 1"


class Programs:
    """A folder that is all of PATH, and what was called in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self._calls = folder / "calls"

    def add(self, name: str, rest: str) -> Path:
        path = self.folder / name
        path.write_text(PROGRAM.format(calls=self._calls, rest=rest))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def calls(self) -> list[str]:
        """Returns the names of the programs called since the last time."""
        if not self._calls.exists():
            return []
        called = [Path(line).name for line in self._calls.read_text().splitlines()]
        self._calls.unlink()
        return called


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", str(made.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.fixture
def code(tmp_path: Path) -> str:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "code.c").write_text("int one(void) { return 1; }\n")
    return str(folder)


def test_what_a_compiler_cannot_do_is_tried_once(
    programs: Programs, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    programs.add("cc", FAILS)
    for _ in range(3):
        assert native.compiled(code) is None
    assert programs.calls() == ["cc"]
    [record] = caplog.records
    assert "stdlib.h" in record.getMessage()


@pytest.mark.parametrize("change", ["another compiler", "a newer compiler", "another code"])
def test_it_is_tried_again_when_something_is_new(
    programs: Programs, code: str, change: str
) -> None:
    first = programs.add("cc", FAILS)
    assert native.compiled(code) is None
    match change:
        case "another compiler":
            first.unlink()
            programs.add("clang", SUCCEEDS)
        case "a newer compiler":
            programs.add("cc", SUCCEEDS)
        case "another code":
            programs.add("cc", FAILS)
            (Path(code) / "code.c").write_text("int two(void) { return 2; }\n")
    programs.calls()
    assert (native.compiled(code) is None) == (change == "another code")
    assert len(programs.calls()) == 1


def test_headers_that_come_later_are_noticed(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "HEADERS", tmp_path / "include")
    programs.add("cc", FAILS)
    before = compiler.find()
    (tmp_path / "include").mkdir()
    after = compiler.find()
    (tmp_path / "include" / "stdlib.h").touch()
    assert len({before, after, compiler.find()}) == 3


def test_a_failure_counts_for_a_day(tmp_path: Path) -> None:
    now_s = 1e9
    failure = Failure(tmp_path / "draw-1.so", lambda: now_s)
    cc = Compiler("cc", "cc 1")
    assert not failure.is_known(cc)
    failure.keep(cc)
    assert failure.is_known(cc)
    assert not failure.is_known(Compiler("cc", "cc 2"))
    now_s += 0.9 * FAILURE_COUNTS_S
    assert failure.is_known(cc)
    now_s += 0.2 * FAILURE_COUNTS_S
    assert not failure.is_known(cc)
    now_s -= 2 * FAILURE_COUNTS_S
    assert not failure.is_known(cc), "a clock that was wrong then"


def test_a_library_that_was_made_leaves_no_failure(programs: Programs, code: str) -> None:
    programs.add("cc", FAILS)
    native.compiled(code)
    programs.add("cc", SUCCEEDS)
    target = native.compiled(code)
    assert target is not None
    assert os.listdir(target.parent) == [target.name]
    assert native.compiled(code) == target
    assert programs.calls() == ["cc", "cc"]


@pytest.mark.parametrize(
    "asked",
    [
        "echo /; exit 2",
        "echo {gone}",
        "echo .",
        "echo",
        None,
    ],
    ids=["none", "gone", "relative", "nothing", "no xcode-select"],
)
def test_on_macos_without_its_tools_no_compiler_is_called(
    programs: Programs, tmp_path: Path, asked: str | None
) -> None:
    """A call would open a dialog."""
    for name in compiler.NAMES:
        programs.add(name, SUCCEEDS)
    if asked is not None:
        programs.add("xcode-select", asked.format(gone=tmp_path / "gone"))
    assert compiler.find(is_macos=True, stubs=programs.folder) is None
    assert compiler.find(is_macos=False, stubs=programs.folder) is not None
    assert not set(programs.calls()) & set(compiler.NAMES)


def test_on_macos_with_its_tools_the_usual_name_is_called(
    programs: Programs, tmp_path: Path
) -> None:
    tools = tmp_path / "CommandLineTools"
    tools.mkdir()
    cc = programs.add("cc", SUCCEEDS)
    programs.add("xcode-select", f"echo {tools}")
    found = compiler.find(is_macos=True, stubs=programs.folder)
    assert found is not None
    assert found.path == str(cc)
    (tools / "SDKs").mkdir()
    assert compiler.find(is_macos=True, stubs=programs.folder) != found
    assert set(programs.calls()) == {"xcode-select"}


def test_on_macos_a_compiler_from_elsewhere_needs_no_tools(programs: Programs) -> None:
    cc = programs.add("gcc", SUCCEEDS)
    found = compiler.find(is_macos=True)
    assert found is not None
    assert found.path == str(cc)
    assert programs.calls() == []
