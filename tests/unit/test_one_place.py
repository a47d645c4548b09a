"""What differs by machine is asked in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "mlx_lm_server"
OF_THE_DEVICE = r"default_device|has_metal"
OF_ITS_MEMORY = (
    r"\bmx\.(metal|cuda|clear_cache|get_cache_memory)\b|\bdevice_info\b|virtual_memory"
    r"|\b[gs]et_(wired|cache|memory)_limit\b|sysctlbyname"
)
OF_THE_SYSTEM = r"sys\.platform|os\.uname|platform\.(machine|system|uname)\(\)"
X86 = r"\bx86\b|fast_math|native_products|native_draw|native_rows|span_attention|code_products"


def files_that_ask(pattern: str) -> set[str]:
    return {
        str(file.relative_to(SOURCES))
        for file in SOURCES.rglob("*.py")
        if re.search(pattern, "\n".join(map(_code_of, file.read_text().splitlines())))
    }


def _code_of(line: str) -> str:
    return line.partition("#")[0]


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (OF_THE_DEVICE, {"runner/backends/choose.py", "runner/device_memory.py"}),
        (OF_ITS_MEMORY, {"runner/device_memory.py"}),
        (OF_THE_SYSTEM, {"platform.py", "native/__init__.py"}),
    ],
    ids=["device", "memory", "system"],
)
def test_only_one_place_asks(pattern: str, allowed: set[str]) -> None:
    assert files_that_ask(pattern) == allowed


def test_the_x86_wing_is_named_by_who_chooses_it_only() -> None:
    others = {file for file in files_that_ask(X86) if not file.startswith("runner/backends/x86/")}
    assert others == {
        "config.py",  # the names of the ways
        "runner/backends/choose.py",
    }
