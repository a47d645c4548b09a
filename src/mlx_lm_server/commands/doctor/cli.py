"""The flags of `mlx-lm-server doctor`."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from mlx_lm_server.commands.doctor.findings import Finding, Level
from mlx_lm_server.commands.doctor.report import line_of, markdown, private_words, verdict
from mlx_lm_server.commands.pipes import ending_when_nobody_reads
from mlx_lm_server.config import NANO, Config
from mlx_lm_server.config_loading import load_config


def doctor(
    model: Annotated[
        str,
        typer.Option(
            metavar="ID_OR_PATH", help="The model to try; one of the hub is downloaded first."
        ),
    ] = NANO,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.toml",
            help="Settings as `serve` reads them; variables count too.",
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Print Markdown for a bug report, without names, paths, hosts and keys.",
        ),
    ] = False,
) -> None:
    """Look at this machine and try a model on it. The exit code is 1 where something is wrong."""
    settings = load_config({"--model": model}, os.environ, config)
    with ending_when_nobody_reads():
        findings = asyncio.run(_find(settings, Console(stderr=report, highlight=False)))
        if report:
            sys.stdout.write(markdown(findings, private_words(settings)))
    raise typer.Exit(int(any(finding.level is Level.WRONG for finding in findings)))


async def _find(settings: Config, console: Console) -> list[Finding]:
    """Shows each finding when it is known, and what they come to."""
    from mlx_lm_server.commands.doctor.model import examine
    from mlx_lm_server.commands.doctor.surroundings import look_around

    findings: list[Finding] = []

    def take(finding: Finding) -> None:
        findings.append(finding)
        console.print(line_of(finding), soft_wrap=True)

    for finding in look_around(settings):
        take(finding)
    async for finding in examine(settings):
        take(finding)
    console.print(verdict(findings))
    return findings
