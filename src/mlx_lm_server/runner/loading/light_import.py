"""mlx-lm without the libraries that it reads prompts and downloads models with.

It imports transformers for its tokenizers and huggingface_hub for its downloads: two seconds of an
engine's start, and where torch is installed half a gigabyte and a second set of threads. An
engine sees token ids and a folder; the server has read the prompt and found the model.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

UNUSED_LIBRARIES = ("transformers", "huggingface_hub")


def import_mlx_lm(*, with_adapters: bool) -> None:
    """Import what an engine calls of mlx-lm while the unused libraries are stand-ins. Who imports
    one of them later, as the Python files of a model may, gets the real one. mlx-lm's own
    tokenizers and downloads do not work in this process any more.

    An mlx-lm that asks more of them than names is left to be imported with the real ones."""
    try:
        with _stand_ins():
            importlib.import_module("mlx_lm.utils")
            if with_adapters:
                importlib.import_module("mlx_lm.tuner.utils")
    except (ImportError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        log.warning("mlx-lm is imported with all it wants: %s", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]


@contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _StandInFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


class _StandInFinder(MetaPathFinder, Loader):
    """Finds the unused libraries and every module in them; `made` are their names."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in UNUSED_LIBRARIES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    """A module in which every name is a class to derive from and to register things with."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _EmptyClass(name, (), {})


class _EmptyClass(type):
    """A class whose every method takes anything and does nothing."""

    def __getattr__(cls, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _do_nothing


def _do_nothing(*_: Any, **__: Any) -> None:
    pass
