"""The flags of `mlx-lm-server chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mlx_lm_server.commands.chat.answers import Answers
from mlx_lm_server.commands.chat.conversation import Conversation
from mlx_lm_server.commands.chat.screens import Pipes, Screen, Terminal
from mlx_lm_server.commands.chat.talk import talk
from mlx_lm_server.commands.pipes import ending_when_nobody_reads
from mlx_lm_server.commands.running_server import ApiKey, RunningServer
from mlx_lm_server.web_names import DEFAULT_URL

SAMPLING = "sampling"


def chat(
    url: Annotated[str, typer.Option(metavar="URL", help="The server to talk to.")] = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Model to ask for; else the first of /v1/models."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message; /system changes it.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            help="Whether the model thinks first, where its template can be told; else as it does "
            "by itself.",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(metavar="X", min=0.1, help="Seconds of silence after which it gives up."),
    ] = 300.0,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=2,
            help="0 is greedy; else the server's.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Share of the likeliest tokens that may be drawn.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="How many tokens may be drawn; 0 is all.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Least probability, over that of the likeliest token.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.01,
            max=10,
            help="Above 1, what was said becomes less likely.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longest answer.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The same seed and the same words get the same answer.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
) -> None:
    """Talk with a running server. In a pipe each line is a message; only answers are written."""
    server = RunningServer.at(url, api_key)
    given: dict[str, Any] = {
        "model": model,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
        "chat_template_kwargs": None if think is None else {"enable_thinking": think},
    }  # fmt: skip
    fields = {name: value for name, value in given.items() if value is not None}
    with ending_when_nobody_reads():
        code = _converse(server, fields, system, timeout)
    raise typer.Exit(code)


def _converse(
    server: RunningServer, fields: dict[str, Any], system: str | None, silence_s: float
) -> int:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen: Screen = Terminal() if is_terminal else Pipes()
    with server.client(silence_s) as client:
        first = Answers(server, client, fields).first_model()
        named = {"model": first} if first else {}
        answers = Answers(server, client, named | fields)
        who = (named | fields).get("model", "a model")
        screen.tell(f"{who} at {server.url}; /help lists what a line can say, /exit leaves")
        return talk(Conversation(system), screen, answers.stream)
