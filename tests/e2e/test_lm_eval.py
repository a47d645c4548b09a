"""lm-eval scores a model through the server as mlx-lm's own evaluation does.

Runs where the extra `eval` is installed: `pip install '.[cpu,dev,eval]'`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.server.models.model_files import NANO_FOLDER
from tests.e2e.conftest import Nano

pytest.importorskip("lm_eval")
PROGRAM = Path(__file__).with_name("lm_eval_scores.py")


def evaluated(*arguments: str) -> dict[str, Any]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(NANO_FOLDER), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **offline},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(600)
def test_scores_are_those_of_mlx_lms_evaluation(nano: Nano) -> None:
    ours, theirs = evaluated(nano.url), evaluated()
    assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
    assert ours["greedy"] == theirs["greedy"]
    assert len(ours["scores"]) == len(theirs["scores"]) == 20
    differences = [
        abs(one - other)
        for mine, its in zip(ours["scores"], theirs["scores"], strict=True)
        for one, other in zip(mine, its, strict=True)
    ]
    print(
        f"acc {ours['acc']:.3f}, acc_norm {ours['acc_norm']:.3f}; {len(differences)} choices, "
        f"largest difference {max(differences):.1e}"
    )
    assert max(differences) < 1e-3
