"""The flags of `mlx-lm-server top`, and how its frames follow each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from mlx_lm_server.commands.pipes import ending_when_nobody_reads
from mlx_lm_server.commands.running_server import (
    ApiKey,
    RefusedError,
    RunningServer,
    UnreachableError,
)
from mlx_lm_server.commands.top.frame import frame
from mlx_lm_server.commands.top.scrape import Interval, Scrape, scrape
from mlx_lm_server.web_names import DEFAULT_URL

SILENCE_S = 5.0
NOT_LET_IN = (401, 403)
# A pipe has no width of its own.
PIPE_WIDTH = 120

Look = tuple[Interval, str]


def top(
    url: Annotated[str, typer.Option(metavar="URL", help="The server to watch.")] = DEFAULT_URL,
    api_key: ApiKey = None,
    interval: Annotated[
        float, typer.Option(metavar="X", min=0.1, max=3600, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Print one frame, of one interval, and end."),
    ] = False,
) -> None:
    """Watch a running server: rows, tokens a second, queue, cache, memory, engine."""
    server = RunningServer.at(url, api_key)
    try:
        with server.client(SILENCE_S) as client, ending_when_nobody_reads():
            looks = watched(lambda: scrape(server, client), interval)
            if once:
                _print_one(looks)
            elif sys.stdout.isatty():
                _live(looks)
            else:
                _print_all(looks)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def watched(look: Callable[[], Scrape], interval_s: float) -> Iterator[Look]:
    """Yields what is known after each interval, and what is in the way of knowing more. A server
    that goes away, or is busy starting, is asked again until it answers.

    Raises UnreachableError where it has never answered, and RefusedError where it does not let us
    in.
    """
    now = Interval(None, look())
    yield now, ""
    trouble = ""
    while True:
        time.sleep(interval_s)
        try:
            found = look()
        except RefusedError as error:
            if error.status in NOT_LET_IN:
                raise
            trouble = str(error)
        except UnreachableError as error:
            trouble = error.what
        else:
            now = Interval(None if trouble else now.now, found)
            trouble = ""
        yield now, trouble


def _print_one(looks: Iterator[Look]) -> None:
    next(looks)
    _print(*next(looks))


def _print_all(looks: Iterator[Look]) -> None:
    for look in looks:
        _print(*look)
        Console().print()


def _print(interval: Interval, trouble: str) -> None:
    """Writes to whatever stdout is now: a frame for a terminal, or as text."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False).print(frame(interval, trouble=trouble, when=_clock()))


def _live(looks: Iterator[Look]) -> None:
    with Live(screen=True, auto_refresh=False) as live:
        for interval, trouble in looks:
            live.update(frame(interval, trouble=trouble, when=_clock()), refresh=True)


def _clock() -> str:
    return time.strftime("%H:%M:%S")
