"""Where a model's chat templates are found, by name: `default`, `tool_use` where it has another
for requests with tools, and whatever else its authors named."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_lm_server.errors import ConfigError, ModelError
from mlx_lm_server.folders import expanded
from mlx_lm_server.server.models.model_files import read_json

OURS = Path(__file__).parent / "chat_templates"
DEFAULT = "default"
TOOL_USE = "tool_use"
# Files of a processor, which some folders keep their only template in.
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")


def find_templates(
    folder: Path, tokenizer_config: Mapping[str, Any], override: str | None
) -> dict[str, str]:
    """The user's template alone (a file, a text, or the name of one of the model's), else the one
    of ours that the folder names as mlx-lm's, else all that the folder has.

    Raises ConfigError for an override that is none of these, ModelError for a file that cannot be
    read.
    """
    if override is not None:
        named = _of_folder(folder, tokenizer_config)
        return {DEFAULT: named[override] if override in named else _read_override(override)}
    if (ours := _ours(tokenizer_config.get("chat_template_type"))) is not None:
        return {DEFAULT: ours}
    return _of_folder(folder, tokenizer_config)


def without_default(names: Collection[str]) -> str:
    """A template for a model that has none named `default`: it refuses every conversation and says
    how to choose one."""
    reason = (
        f"the model has chat templates for {', '.join(sorted(names))} and no default one; "
        "start with --chat-template and one of these names"
    )
    return f"{{{{ raise_exception({json.dumps(reason)}) }}}}"


def _of_folder(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the folder's templates; a default in a file of its own makes those in the JSON files
    void."""
    files = _files(folder)
    if DEFAULT in files:
        return files
    listed = _named(tokenizer_config.get("chat_template")) or _of_processor(folder)
    return {**listed, **files}


def _files(folder: Path) -> dict[str, str]:
    main = folder / "chat_template.jinja"
    paths = {DEFAULT: main} if main.is_file() else {}
    paths |= {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    return {name: _read(path) for name, path in paths.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _of_processor(folder: Path) -> dict[str, str]:
    for name in PROCESSOR_FILES:
        if found := _named(read_json(folder / name).get("chat_template")):
            return found
    return {}


def _named(given: Any) -> dict[str, str]:
    """Templates as JSON has them: one text, an object, or a list of objects with name and text."""
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, list):
        given = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
    if not isinstance(given, dict):
        return {}
    pairs = given.items()
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _ours(kind: Any) -> str | None:
    """What mlx-lm keeps as code, by the name that it goes by there."""
    file = OURS / f"{kind}.jinja"
    is_name = isinstance(kind, str) and kind.isidentifier()
    return file.read_text(encoding="utf-8") if is_name and file.is_file() else None


def _read_override(override: str) -> str:
    if "{" in override or "\n" in override:
        return override
    try:
        return expanded(override).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {override}: no template and no such file") from error
