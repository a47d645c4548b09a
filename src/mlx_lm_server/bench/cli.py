"""`mlx-lm-server bench`: measure any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlx_lm_server.bench.client import Target
from mlx_lm_server.bench.plans import Shape
from mlx_lm_server.bench.progress import RoundBar, RoundLines, progress_of
from mlx_lm_server.bench.report import as_json, print_table
from mlx_lm_server.bench.session import Session, Settings, TargetUnusableError
from mlx_lm_server.bench.workloads import WORKLOADS
from mlx_lm_server.web_names import DEFAULT_URL


def bench(
    url: Annotated[
        str, typer.Option(metavar="URL", help="The server to measure (A).")
    ] = DEFAULT_URL,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A second server (B); rounds are interleaved A B A B. The same one again shows "
            "how far two measurements of one thing differ.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Model to ask for; else none is named, or the first of /v1/models."
        ),
    ] = None,
    compare_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same for the second server.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"One of {', '.join(WORKLOADS)}; repeat it for several. Without it: all.",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="Rounds of each workload.")
    ] = 3,
    requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests per client and round.")
    ] = 2,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of a prompt.")
    ] = 128,
    output_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of an answer.")
    ] = 64,
    long_prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of the prompt of `long-prompt`.")
    ] = 3000,
    decoder_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=32,
            help="Answer length of the decoders that newcomers arrive beside.",
        ),
    ] = 1024,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Makes the prompts repeatable; a server may know them then."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="OPENAI_API_KEY", help="Sent as `Authorization: Bearer KEY`."
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.1, help="Seconds of silence after which a request has failed."
        ),
    ] = 120.0,
    max_round_s: Annotated[
        float, typer.Option(metavar="X", min=1, help="Longest time of a round.")
    ] = 600.0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the numbers to this file."),
    ] = None,
) -> None:
    """Measure throughput and latencies of an OpenAI-compatible server."""
    shape = Shape(
        prompt_tokens, output_tokens, requests, long_prompt_tokens, decoder_tokens=decoder_tokens
    )
    settings = Settings(
        _known_workloads(workload),
        rounds,
        secrets.randbits(32) if seed is None else seed,
        shape,
        timeout,
        max_round_s,
    )
    targets = [Target(url, model, api_key)]
    if compare is not None:
        targets.append(Target(compare, compare_model, api_key))
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"{json_file.parent} is no folder", param_hint="--json")
    raise typer.Exit(_measure(targets, settings, json_file))


def _known_workloads(names: list[str] | None) -> tuple[str, ...]:
    for name in names or ():
        if name not in WORKLOADS:
            raise typer.BadParameter(
                f"{name!r} is none of {', '.join(WORKLOADS)}", param_hint="--workload"
            )
    return tuple(dict.fromkeys(names)) if names else tuple(WORKLOADS)


def _measure(targets: list[Target], settings: Settings, json_file: Path | None) -> int:
    """The exit code: 0, or 1 where a request failed or the run was cut off."""
    console = Console()
    num_rounds = len(settings.workloads) * settings.rounds * len(targets)
    progress = progress_of(num_rounds, Console(stderr=True))
    session = Session(targets, settings, progress)
    is_whole = False
    try:
        _show(session, progress)
        is_whole = True
    except TargetUnusableError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted; this is what was measured so far")
    if session.outcomes:
        print_table(session, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(session), indent=1) + "\n")
    has_errors = any(outcome.summary.num_errors for outcome in session.outcomes)
    return 0 if is_whole and not has_errors else 1


def _show(session: Session, progress: RoundBar | RoundLines) -> None:
    progress.start()
    try:
        _run_loop(session)
    finally:
        progress.stop()


def _run_loop(session: Session) -> None:
    """uvloop halves what the client costs, where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(session.run())
    else:
        uvloop.run(session.run())
