"""The command line. `serve` is what runs where no command is named.

The flags of `serve` are made from the fields of `config.Config`; other commands are imported only
when they are called, so that serving does not pay for them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_lm_server import __version__
from mlx_lm_server.cli_help import HelpfulCommand, value_of_switch
from mlx_lm_server.config import NANO, PANELS
from mlx_lm_server.config_loading import (
    FALSE_WORDS,
    TRUE_WORDS,
    Setting,
    env_name,
    flag_name,
    load_config,
    settings,
)
from mlx_lm_server.errors import ConfigError, ServerError

PROGRAM = "mlx-lm-server"
# Commands that live elsewhere: name → (module, attribute, one line for the help).
LAZY_COMMANDS = {
    "bench": ("mlx_lm_server.bench.cli", "bench", "measure any OpenAI-compatible server"),
    "chat": ("mlx_lm_server.commands.chat.cli", "chat", "talk with a running server"),
    "top": ("mlx_lm_server.commands.top.cli", "top", "watch a running server"),
    "doctor": (
        "mlx_lm_server.commands.doctor.cli",
        "doctor",
        "look at this machine and try a model on it",
    ),
}
COMMANDS = ("serve", *LAZY_COMMANDS)
MODEL_ARGUMENT = "model_argument"
# Of a context: nobody said `serve`, so its argument may as well be a command that is mistyped.
IS_IMPLIED = "mlx_lm_server.is_implied"
# Wider lists of choices stand in the text of the help.
MAX_METAVAR = 22
# Typer does not export UsageError, the base of its BadParameter.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class DefaultToServe(TyperGroup):
    """`mlx-lm-server --port 1` is `mlx-lm-server serve --port 1`, and so is a model that stands
    where a command could."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*COMMANDS, "--version"):
            ctx.meta[IS_IMPLIED] = True
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
            app.command(cmd_name, cls=HelpfulCommand)(command)
            command = app
        return typer.main.get_command(command)


class ServeCommand(HelpfulCommand):
    """Refuses what click would take for a model, and was meant otherwise."""

    examples = (
        (f"{PROGRAM} nano", "the bundled demo model, offline"),
        (f"{PROGRAM} org/name", "a model of the hub; or its folder"),
        *((f"{PROGRAM} {name} -h", about) for name, (*_, about) in LAZY_COMMANDS.items()),
        (f"{PROGRAM} --version", "what is installed"),
    )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError for a value after a switch, and for a mistyped command."""
        if found := value_of_switch(self.params, args, TRUE_WORDS | FALSE_WORDS):
            raise ConfigError(_no_value(*found))
        rest = super().parse_args(ctx, args)
        name = ctx.params.get(MODEL_ARGUMENT)
        if name in COMMANDS:
            raise ConfigError(
                f"{name} is a command and comes first: {PROGRAM} {name} …; "
                f"a model's folder of this name is ./{name}"
            )
        if name is not None and ctx.meta.get(IS_IMPLIED) and not _is_surely_a_model(name):
            raise ConfigError(_no_command(name))
        return rest


def _no_value(flag: str, value: str) -> str:
    """Says how to write what `--no-ssd true` and `--no-ssd false` mean."""
    opposite = f"--no-{flag[2:]}"
    flags = {f for s in settings() for n in s.names for f in shown_flag(s, n).split("/")}
    way_out = f"write {flag} alone"
    if value.lower() in FALSE_WORDS:
        way_out = f"write {opposite}" if opposite in flags else "leave it out"
    return f"{flag} is a switch and takes no value: instead of {flag} {value} {way_out}"


def _is_surely_a_model(name: str) -> bool:
    return name == NANO or "/" in name or (Path(name) / "config.json").is_file()


def _no_command(word: str) -> str:
    near = difflib.get_close_matches(word, (*COMMANDS, NANO), n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return (
        f"{word} is no command ({', '.join(COMMANDS)}){hint} "
        f"If it is a model: {PROGRAM} serve {word}"
    )


app = typer.Typer(
    cls=DefaultToServe,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    file, model = given.pop("config", None), given.pop(MODEL_ARGUMENT, None)
    flags = {
        flag_name(name): value for name, value in given.items() if value is not None and value != []
    }
    if model is not None and flags.setdefault("--model", model) != model:
        raise ConfigError(f"two models are named, {model} and --model {flags['--model']}: name one")
    config = load_config(flags, os.environ, file)
    from mlx_lm_server.server.serve import run

    raise typer.Exit(run(config))


def _parameter(setting: Setting, name: str) -> inspect.Parameter:
    """One flag. Values stay text: config_loading converts them as it does those of a file."""
    is_flag = setting.kind == "bool"
    is_list = setting.kind == "list"
    is_alias = name != setting.name
    info = typer.Option(
        shown_flag(setting, name),
        help=f"The same as {flag_name(setting.name)}." if is_alias else _help(setting),
        metavar=None if is_flag else _metavar(setting),
        rich_help_panel=PANELS[setting.section],
        show_default=False if is_alias else _default_and_unit(setting),
    )
    hint: Any = bool if is_flag else list[str] if is_list else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[hint | None, info],
    )


def _help(setting: Setting) -> str:
    choices = _choices(setting)
    is_long = len("|".join(choices)) > MAX_METAVAR
    return setting.option.help + (f" One of {', '.join(choices)}." if is_long else "")


def _default_and_unit(setting: Setting) -> str | bool:
    """Nothing for a plain switch: it is off."""
    if setting.default is False:
        return False
    default, unit = shown_default(setting), setting.option.unit
    is_number = isinstance(setting.default, int | float)
    return default + (f" {unit}" if unit and is_number else f"; in {unit}" if unit else "")


def _choices(setting: Setting) -> list[str]:
    auto = ["auto"] if setting.is_optional and setting.choices else []
    return [*auto, *map(str, setting.choices)]


def shown_flag(setting: Setting, name: str) -> str:
    """What is on by default has a flag to turn it off beside the one that turns it on."""
    flag = flag_name(name)
    return f"{flag}/--no-{flag[2:]}" if setting.default is True else flag


def _metavar(setting: Setting) -> str:
    if setting.option.metavar:
        return setting.option.metavar
    if setting.choices:
        joined = "|".join(_choices(setting))
        return joined if len(joined) <= MAX_METAVAR else "NAME"
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
    model = typer.Argument(
        metavar="MODEL",
        help="The model, as --model names it.",
        rich_help_panel=PANELS["model"],
        show_default=False,
    )
    file = typer.Option(
        "--config",
        metavar="FILE.toml",
        help=f"Read settings from a file; keys are the flags without dashes in front. "
        f"Every flag is also a variable, --port is {env_name('port')}; flags go first.",
    )
    first = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, info],
        )
        for name, info in ((MODEL_ARGUMENT, model), ("config", file))
    ]
    flags = [_parameter(setting, name) for setting in settings() for name in setting.names]
    return inspect.Signature([*first, *flags])


serve.__signature__ = _signature()  # type: ignore[attr-defined]
serve.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
app.command(cls=ServeCommand)(serve)


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
