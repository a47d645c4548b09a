"""Writes the pages here that are made from the code: `python docs/reference/generate.py`.

A test compares them with what is committed.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from mlx_lm_server.cli import shown_default, shown_flag
from mlx_lm_server.config import PANELS
from mlx_lm_server.config_loading import Setting, env_name, key_name, settings

FOLDER = Path(__file__).parent

INTRODUCTION = """\
# Settings

Made by `docs/reference/generate.py` from the fields of `config.py`; edit those.

Every setting is a flag (`--max-batch-size 16`), a variable of the environment
(`MLX_LM_SERVER_MAX_BATCH_SIZE=16`) and a key of a file given with `--config FILE.toml`
(`max-batch-size = 16`). Flags go before variables, variables before the file, the file before the
defaults. `auto` or `none` stands for the default of a setting that is chosen by the server. A name
that is none, a value out of range or a combination that cannot be stops the start with one line and
exit code 2.
"""


def flags_page() -> str:
    """docs/reference/flags.md"""
    sections = [INTRODUCTION]
    for section, items in groupby(settings(), key=lambda setting: setting.section):
        entries = "\n".join(map(_entry, items))
        sections.append(f"## {PANELS[section]}\n\n{entries}")
    return "\n".join(sections)


def _entry(setting: Setting) -> str:
    option = setting.option
    flags = [flag for name in setting.names for flag in shown_flag(setting, name).split("/")]
    names = ", ".join(f"`{flag}`" for flag in flags)
    default = shown_default(setting)
    if setting.default not in (None, ()):
        default = f"`{default}`"
    facts = [f"Default {default}", *_values(setting)]
    return (
        f"### {names}\n\n{option.help}\n\n"
        f"{'; '.join(facts)}. Variable `{env_name(setting.name)}`, key `{key_name(setting.name)}`. "
        f"Why this default: {option.why}\n"
    )


def _values(setting: Setting) -> list[str]:
    """What a value may be, as far as its default does not say it."""
    option = setting.option
    found = []
    if setting.choices:
        found.append("one of " + ", ".join(f"`{choice}`" for choice in setting.choices))
    if option.unit:
        found.append(f"in {option.unit}")
    if option.low is not None:
        found.append(f"at least {option.low:g}")
    if option.high is not None:
        found.append(f"at most {option.high:g}")
    return found


if __name__ == "__main__":
    (FOLDER / "flags.md").write_text(flags_page(), encoding="utf-8")
