"""Print the numbers that this project claims: every script, or those that are named.

python -m benchmarks [list | SCRIPT] [part …] [--quick] [--rounds N]
"""

from __future__ import annotations

import sys

from benchmarks import (
    deaths,
    device,
    engine_loop,
    families,
    fields,
    kv_bits,
    layouts,
    prefix,
    products,
    restarts,
    revisions,
    serving,
    shape,
    soak,
    starts,
    tier,
)
from benchmarks.parts import console, run_parts

SCRIPTS = {
    "engine": engine_loop,
    "families": families,
    "fields": fields,
    "layouts": layouts,
    "blas": products,
    "prefix": prefix,
    "serving": serving,
    "kv-bits": kv_bits,
    "soak": soak,
    "tier": tier,
    "restarts": restarts,
    "revisions": revisions,
    "starts": starts,
    "deaths": deaths,
    "device": device,
    "shape": shape,
}


def main(given: list[str]) -> int:
    if given[:1] == ["list"]:
        for script, module in SCRIPTS.items():
            for part, function in module.PARTS.items():
                console.print(f"{script:8} {part:12} {function.__doc__}")
        return 0
    if given and given[0] in SCRIPTS:
        return _run(given[0], given[1:])
    if given and not given[0].startswith("-"):
        console.print(f"{given[0]!r} is none of list, {', '.join(SCRIPTS)}")
        return 2
    return max(_run(script, given) for script in SCRIPTS)


def _run(script: str, given: list[str]) -> int:
    module = SCRIPTS[script]
    return run_parts(script, module.PARTS, module.__doc__, given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
