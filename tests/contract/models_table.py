"""Walks all families of the installed mlx-lm and prints how each is served.

    python -m tests.contract.models_table [family …] > docs/reference/models.md

Each family gets a tiny configuration and random weights; the probe that chooses the way is the one
that runs when a model is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_map

from mlx_lm_server.runner import patches
from mlx_lm_server.runner.backends.choose import choose
from mlx_lm_server.runner.loading import probe
from mlx_lm_server.runner.seam import attention
from mlx_lm_server.runner.seam.language_model import LanguageModel
from mlx_lm_server.runner.state.cache_kinds import ModelState, UnbatchableState, read_state

from .tiny_configs import families, tiny_config

NOT_LOADABLE = (ImportError, SystemExit, *attention.SEAM_ERRORS)

HEAD = """\
# Models

How each family of mlx-lm {version} is served. Made by `python -m tests.contract.models_table`, with
tiny random weights; a model of your own is examined in the same way when it is loaded, and
`/health` shows the answer. `make newest` makes it with the newest mlx-lm and says what moved.

- **packed**: all tokens of a step in one forward, decode rows and prompt chunks alike.
- **split**: the decode rows of a step in one forward, each prompt chunk in its own.
- **alone**: each row in its own forward; correct, and no faster with more rows.
- **not loaded**: mlx-lm itself does not run it here, or no tiny configuration is known for it.

| family | served | keeps | why not better |
|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    family: str
    served: str
    keeps: str
    reason: str

    def __str__(self) -> str:
        reason = self.reason.replace("|", "\\|")
        return f"| {self.family} | {self.served} | {self.keeps} | {reason} |"


def random_model(family: str) -> nn.Module:
    """Raises one of NOT_LOADABLE."""
    config = tiny_config(family)
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    model.update(tree_map(_widen, model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters(), model(mx.array([[1, 2, 3]])))
    return model


def examine(family: str) -> Row:
    try:
        model = random_model(family)
        state, why = _state_of(model)
    except NOT_LOADABLE as error:
        return Row(family, "not loaded", "", f"{type(error).__name__}: {error}".split("\n")[0])
    choice = probe.choose_forward(LanguageModel(model), state, why, choose())
    keeps = ", ".join(state.kinds) if state else "state of its own"
    return Row(family, choice.batching, keeps, choice.reason)


def _state_of(model: nn.Module) -> tuple[ModelState | None, str]:
    try:
        return read_state(model), ""
    except UnbatchableState as reason:
        return None, str(reason)


def _widen(weight: mx.array) -> mx.array:
    return mx.random.normal(weight.shape) * 0.2 if weight.ndim > 1 else weight


def main(names: Sequence[str]) -> None:
    mx.set_default_device(mx.cpu)
    patches.install(choose())
    print(HEAD.format(version=mlx_lm.__version__))
    for family in names or families():
        with contextlib.redirect_stdout(sys.stderr):  # some families print what they miss
            row = examine(family)
        print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
