"""The command line. `serve` is what runs where no command is named.

The flags of `serve` are made from the fields of `config.Config`; other commands are imported only
when they are called, so that serving does not pay for them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_lm_server import __version__
from mlx_lm_server.config import PANELS
from mlx_lm_server.config_loading import Setting, env_name, flag_name, load_config, settings
from mlx_lm_server.errors import ConfigError, ServerError

PROGRAM = "mlx-lm-server"
# Commands that live elsewhere: name → (module, attribute, one line for the help).
LAZY_COMMANDS = {
    "bench": ("mlx_lm_server.bench.cli", "bench", "Measure any OpenAI-compatible server."),
}
# Typer does not export UsageError, the base of its BadParameter.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class DefaultToServe(TyperGroup):
    """`mlx-lm-server --port 1` is `mlx-lm-server serve --port 1`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--version"):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in LAZY_COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = LAZY_COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(cmd_name)(command)
            command = app
        return typer.main.get_command(command)


app = typer.Typer(
    cls=DefaultToServe,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """A production LLM server on MLX."""
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def serve(**given: Any) -> None:
    """Serve a model over HTTP with the OpenAI API."""
    file = given.pop("config", None)
    flags = {
        flag_name(name): value for name, value in given.items() if value is not None and value != []
    }
    config = load_config(flags, os.environ, file)
    from mlx_lm_server.server.serve import run

    raise typer.Exit(run(config))


def _parameter(setting: Setting, name: str) -> inspect.Parameter:
    """One flag. Values stay text: config_loading converts them as it does those of a file."""
    is_flag = setting.kind == "bool"
    is_list = setting.kind == "list"
    help = setting.option.help.replace("[", "\\[")
    if name != setting.name:
        help = f"The same as {flag_name(setting.name)}."
    elif setting.option.unit:
        help = f"{help} [dim]{setting.option.unit}[/dim]"
    info = typer.Option(
        shown_flag(setting, name),
        help=help,
        metavar=None if is_flag else _metavar(setting),
        rich_help_panel=PANELS[setting.section],
        show_default=shown_default(setting) if name == setting.name else False,
    )
    hint: Any = bool if is_flag else list[str] if is_list else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[hint | None, info],
    )


def shown_flag(setting: Setting, name: str) -> str:
    """What is on by default has a flag to turn it off beside the one that turns it on."""
    flag = flag_name(name)
    return f"{flag}/--no-{flag[2:]}" if setting.default is True else flag


def _metavar(setting: Setting) -> str:
    if setting.option.metavar:
        return setting.option.metavar
    if setting.choices:
        auto = ["auto"] if setting.is_optional else []
        return "|".join([*auto, *map(str, setting.choices)])
    return {"int": "N", "float": "X"}.get(setting.kind, "TEXT")


def shown_default(setting: Setting) -> str:
    """The default in words, for the help and the reference."""
    if setting.default is None or setting.default == ():
        return setting.option.unset
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    if isinstance(setting.default, float):
        return f"{setting.default:g}"
    return str(setting.default)


def _signature() -> inspect.Signature:
    info = typer.Option(
        "--config",
        metavar="FILE.toml",
        help=f"Read settings from a file; keys are the flags without dashes in front. "
        f"Every flag is also a variable, --port is {env_name('port')}; flags go first.",
    )
    file = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, info],
    )
    flags = [_parameter(setting, name) for setting in settings() for name in setting.names]
    return inspect.Signature([file, *flags])


serve.__signature__ = _signature()  # type: ignore[attr-defined]
serve.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
_others = "\n\n".join(f"{PROGRAM} {name}: {line}" for name, (_, _, line) in LAZY_COMMANDS.items())
app.command(epilog=f"Other commands ({PROGRAM} COMMAND --help)\n\n{_others}")(serve)


def main(args: Sequence[str] | None = None) -> None:
    """Exit codes: 0 clean, 1 failed, 2 usage. Any error is one line."""
    try:
        code = app(args=args, prog_name=PROGRAM, standalone_mode=False)
    except UsageError as error:
        _fail(str(getattr(error, "format_message", error.__str__)()), 2)
    except ConfigError as error:
        _fail(str(error), 2)
    except ServerError as error:
        _fail(str(error), 1)
    except typer.Abort:
        _fail("aborted", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    typer.echo(f"{PROGRAM}: {message}", err=True)
    sys.exit(code)
