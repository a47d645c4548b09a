"""Findings as lines of a terminal, and as Markdown that may be shown to anybody."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from rich.text import Text

from mlx_lm_server import __version__
from mlx_lm_server.commands.doctor.findings import Finding, Level
from mlx_lm_server.config import NANO, Config
from mlx_lm_server.web_names import is_loopback

HIDDEN = "…"
SUBJECT_WIDTH = 17
STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.WRONG: "bold red"}
USER_VARIABLES = ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOST", "COMPUTERNAME")
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
SHORTEST_SECRET = 6
# Whole addresses, and paths: from a root, a home, here or above, or with two slashes within.
ADDRESS = re.compile(r"\b\w+://\S+")
PATH = re.compile(
    r"(?<![\w/.~-])(?:~[\w.-]*|\.{1,2})?/[^\s,;:'\"`()\[\]]+|[\w.~-]+(?:/[\w.~-]+){2,}/?"
)


def line_of(finding: Finding) -> Text:
    """Returns a finding as one line: how it is, what it is about, what was found, what to do."""
    line = Text.assemble(
        (finding.level.value.ljust(6), STYLES[finding.level]),
        (finding.subject.ljust(SUBJECT_WIDTH), "bold"),
        finding.words,
    )
    if finding.advice:
        line.append(f" → {finding.advice}")
    return line


def verdict(findings: Iterable[Finding]) -> str:
    num_wrong = sum(finding.level is Level.WRONG for finding in findings)
    if num_wrong == 0:
        return "all is well"
    return "1 thing is wrong" if num_wrong == 1 else f"{num_wrong} things are wrong"


def markdown(findings: Sequence[Finding], private: Sequence[str]) -> str:
    """Returns a table for a bug report in which none of the `private` words is left."""
    rows = [
        ("", "what", "found", "what to do"),
        ("---", "---", "---", "---"),
        *((f.level.value, f.subject, f.words, f.advice) for f in findings),
    ]
    table = "".join(f"| {' | '.join(_cell(text, private) for text in row)} |\n" for row in rows)
    return f"mlx-lm-server {__version__}: {verdict(findings)}\n\n{table}"


def _cell(text: str, private: Sequence[str]) -> str:
    return public(text, private).replace("|", "/")


def public(text: str, private: Sequence[str]) -> str:
    """Returns a text, in one line, without private words, paths and addresses. Known places go
    first: what is a path ends at a space, and they may have one."""
    text = " ".join(text.split())
    text = _without(text, [word for word in private if "/" in word])
    return _without(PATH.sub(HIDDEN, ADDRESS.sub(HIDDEN, text)), private)


def _without(text: str, words: Sequence[str]) -> str:
    for word in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", HIDDEN, text, flags=re.IGNORECASE)
    return text


def private_words(config: Config, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns what names the user, the machine or a place on it, and keys."""
    found = dict.fromkeys(_private_words(config, environment))
    return [word for word in found if word.strip("/")]


def _private_words(config: Config, environment: Mapping[str, str]) -> Iterator[str]:
    yield from (environment.get(name, "") for name in USER_VARIABLES)
    yield environment.get("HOME", "")
    for name, value in environment.items():
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET:
            yield value
    host = socket.gethostname()
    yield from (host, host.partition(".")[0])
    with suppress(KeyError):
        entry = pwd.getpwuid(os.getuid())
        yield from (entry.pw_name, entry.pw_gecos.partition(",")[0], entry.pw_dir)
    server, model = config.server, config.model
    places = (server.api_key_file, server.uds, server.ssl_certfile, server.ssl_keyfile)
    yield from (place or "" for place in (*places, model.adapter_path, config.tier.ssd_cache_dir))
    yield server.api_key or ""
    yield "" if is_loopback(server.host) else server.host
    if model.model != NANO and os.path.exists(os.path.expanduser(model.model)):
        yield model.model
