"""Reads settings from their sources, later ones going first: defaults < file < environment < flags.

Whatever the source, a value goes through the same conversion and the same checks; the first thing
wrong raises `ConfigError` with one line that names the source's own word for the setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mlx_lm_server.config import Config, Option, ServerConfig
from mlx_lm_server.errors import ConfigError
from mlx_lm_server.web_names import is_loopback

ENV_PREFIX = "MLX_LM_SERVER_"
TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of Config with its place and its type taken apart."""

    section: str
    name: str
    kind: str  # str, int, float, bool, list, json, choice
    choices: tuple[str | int, ...]
    is_optional: bool
    default: Any
    option: Option

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.option.aliases)


def settings() -> Iterator[Setting]:
    """Every setting in the order of the fields."""
    for section in dataclasses.fields(Config):
        cls = get_type_hints(Config)[section.name]
        hints = get_type_hints(cls)
        for item in dataclasses.fields(cls):
            kind, choices, is_optional = _kind_of(hints[item.name])
            yield Setting(
                section.name,
                item.name,
                kind,
                choices,
                is_optional,
                item.default,
                item.metadata["option"],
            )


def _kind_of(hint: Any) -> tuple[str, tuple[str | int, ...], bool]:
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(arg for arg in get_args(hint) if arg is not types.NoneType)
        kind, choices, _ = _kind_of(inner)
        return kind, choices, True
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return "int" if isinstance(choices[0], int) else "choice", choices, False
    if get_origin(hint) is tuple:
        return "list", (), False
    if get_origin(hint) is Mapping:
        return "json", (), False
    return hint.__name__, (), False


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    return ENV_PREFIX + name.upper()


def key_name(name: str) -> str:
    return name.replace("_", "-")


def load_config(flags: Mapping[str, Any], env: Mapping[str, str], file: str | None) -> Config:
    """The checked Config. `flags` maps flags (`--port`) that were given. Raises ConfigError."""
    file = file or env.get(env_name("config"))
    values: dict[str, Any] = {}
    if file:
        values.update(_collect(_read_file(Path(file)), key_name, f"{file}: "))
    values.update(_collect(_own_variables(env), env_name))
    values.update(_collect(flags, flag_name))
    config = _build(values)
    check_combinations(config)
    return config


def _build(values: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings():
        if setting.name in values:
            sections.setdefault(setting.section, {})[setting.name] = values[setting.name]
    hints = get_type_hints(Config)
    return Config(**{name: hints[name](**given) for name, given in sections.items()})


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error


def _own_variables(env: Mapping[str, str]) -> dict[str, str]:
    config = env_name("config")
    return {k: v for k, v in env.items() if k.startswith(ENV_PREFIX) and k != config}


def _collect(
    given: Mapping[str, Any], spell: Callable[[str], str], prefix: str = ""
) -> dict[str, Any]:
    """Converted values of one source; `spell` turns a setting's name into the source's word."""
    known = {spell(name): setting for setting in settings() for name in setting.names}
    found: dict[str, tuple[str, Any]] = {}
    for word, raw in given.items():
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{prefix}{word} is no setting of mlx-lm-server{hint}")
        setting = known[word]
        value = convert(setting, raw, prefix + word)
        other, earlier = found.get(setting.name, (word, value))
        if earlier != value:
            raise ConfigError(f"{prefix}{other} and {word} are the same setting and differ")
        found[setting.name] = (word, value)
    return {name: value for name, (_, value) in found.items()}


def convert(setting: Setting, raw: Any, label: str) -> Any:
    """`raw`, a string or a TOML value, as the setting's type. Raises ConfigError."""
    if setting.is_optional and raw in ("", "auto", "none"):
        return None
    try:
        value = _CONVERTERS[setting.kind](raw)
    except (ValueError, TypeError) as error:
        wanted = _one_of(setting) if setting.choices else _WANTED[setting.kind]
        shown = "the value" if setting.option.is_secret else repr(raw)
        raise ConfigError(f"{label}: {shown} is not {wanted}") from error
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{label}: {raw!r} is not {_one_of(setting)}")
    _check_range(setting.option, value, label)
    _check_items(setting.option, value, label)
    return value


def _one_of(setting: Setting) -> str:
    return "one of " + ", ".join(map(str, setting.choices))


def _check_range(option: Option, value: Any, label: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{label}: {value} is not a finite number")
    if option.low is not None and value < option.low:
        raise ConfigError(f"{label}: {value} is below {option.low:g}")
    if option.high is not None and value > option.high:
        raise ConfigError(f"{label}: {value} is above {option.high:g}")


def _check_items(option: Option, value: Any, label: str) -> None:
    if option.fault is None:
        return
    for item in value:
        fault = option.fault(item)
        if fault is not None:
            raise ConfigError(f"{label}: {item!r} {fault}")


def _to_str(raw: Any) -> str:
    if not isinstance(raw, str) or not raw:
        raise ValueError
    return raw


def _to_int(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise ValueError
    return int(raw)


def _to_float(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError
    return float(raw)


def _to_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in TRUE_WORDS | FALSE_WORDS:
        return raw.lower() in TRUE_WORDS
    raise ValueError


def _to_list(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, str):
        raw = [item.strip() for item in raw.split(",") if item.strip()]
    if not isinstance(raw, Sequence):
        raise ValueError
    return tuple(_to_str(item) for item in raw)


def _to_json(raw: Any) -> Mapping[str, Any]:
    value = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(value, dict):
        raise ValueError
    return value


_CONVERTERS: dict[str, Any] = {
    "str": _to_str,
    "choice": _to_str,
    "int": _to_int,
    "float": _to_float,
    "bool": _to_bool,
    "list": _to_list,
    "json": _to_json,
}
_WANTED = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list of texts",
    "json": "a JSON object",
}


def listens_to_the_network(server: ServerConfig) -> bool:
    """Whether more than this machine can connect."""
    return server.uds is None and not is_loopback(server.host)


def check_combinations(config: Config) -> None:
    """Raises ConfigError for settings that cannot go together."""
    server, batching = config.server, config.batching
    has_key = server.api_key is not None or server.api_key_file is not None
    if listens_to_the_network(server) and not has_key and not server.allow_unauthenticated:
        raise ConfigError(
            f"--host {server.host} is open to the network: give --api-key or --api-key-file, "
            "or say --allow-unauthenticated"
        )
    if (server.ssl_certfile is None) != (server.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together")
    if server.uds is not None and server.ssl_certfile is not None:
        raise ConfigError("--uds and --ssl-certfile exclude each other")
    budget, chunk = batching.max_num_batched_tokens, batching.prefill_step_size
    if budget is not None and chunk is not None and chunk > budget:
        raise ConfigError(f"--prefill-step-size {chunk} is over --max-num-batched-tokens {budget}")
    if budget is not None and budget < batching.max_batch_size:
        raise ConfigError(
            f"--max-num-batched-tokens {budget} is below --max-batch-size "
            f"{batching.max_batch_size}: each decoding row takes a token of it"
        )
    generation = config.generation
    default, limit = generation.default_max_tokens, generation.max_generation_tokens
    if default is not None and limit is not None and default > limit:
        raise ConfigError(f"--default-max-tokens {default} is over --max-generation-tokens {limit}")
