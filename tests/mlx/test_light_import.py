"""An engine process imports mlx-lm without the libraries that it does not use, and loses nothing.

In processes of their own, since here mlx-lm has been imported with all it wants.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.mlx.driver import EngineDriver, random_prompts
from tests.mlx.tiny_models import VOCAB_SIZE, write_adapter, write_model

LENGTHS = [20, 33]
IMPORTS = """
import contextlib, importlib, json, pkgutil, sys
from pathlib import Path
from mlx_lm_server.runner.loading import light_import
"""
BEGIN = """
light_import.import_mlx_lm(with_adapters=True)
UNUSED = ("transformers", "huggingface_hub", "tokenizers", "torch")
def unused(): return [name for name in UNUSED if name in sys.modules]
"""
EVERY_FAMILY = """
import mlx_lm.models
for module in pkgutil.iter_modules(mlx_lm.models.__path__):
    with contextlib.suppress(SystemExit):  # olmo's, which wants a package of its own
        importlib.import_module(f"mlx_lm.models.{module.name}")
print(json.dumps(unused()))
"""
OWN_CODE = """
import transformers
from mlx_lm.models.qwen3 import *
assert issubclass(transformers.PreTrainedTokenizerFast, transformers.PreTrainedTokenizerBase)
"""
RUN = """
from tests.mlx.driver import EngineDriver, random_prompts
before = unused()
driver = EngineDriver(Path(sys.argv[1]), adapter_path=sys.argv[2], trust_remote_code=True)
prompts = random_prompts(1, json.loads(sys.argv[3]), int(sys.argv[4]))
print(json.dumps([before, driver.run(prompts)]))
"""
WITH_THE_REAL_ONE = """
import transformers
light_import.import_mlx_lm(with_adapters=False)
from mlx_lm import tokenizer_utils
kept = sys.modules["transformers"] is transformers
print(json.dumps([kept, tokenizer_utils.AutoTokenizer is transformers.AutoTokenizer]))
"""


def run(program: str, *arguments: object) -> object:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + program, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_family_asks_for_the_libraries() -> None:
    assert run(BEGIN + EVERY_FAMILY) == []


def test_adapters_give_their_tokens_and_a_models_own_code_gets_the_real_library(
    tmp_path: Path,
) -> None:
    folder = write_model("qwen3", tmp_path / "model")
    adapter = write_adapter(folder, tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (folder / "own.py").write_text(OWN_CODE)
    before, tokens = run(BEGIN + RUN, folder, adapter, LENGTHS, VOCAB_SIZE)
    driver = EngineDriver(folder, adapter_path=str(adapter), trust_remote_code=True)
    assert before == []
    assert tokens == driver.run(random_prompts(1, LENGTHS, VOCAB_SIZE))


def test_an_mlx_lm_that_wants_more_of_a_library_gets_the_real_one(tmp_path: Path) -> None:
    """Here is one that looks at the version."""
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").write_text("")
    (tmp_path / "mlx_lm" / "utils.py").write_text(
        "import transformers\nVERSION = transformers.__version__.split('.')\n"
    )
    program = BEGIN.replace(
        "light_import.import", f"sys.path.insert(0, {str(tmp_path)!r})\nlight_import.import"
    )
    assert int(run(program + "from mlx_lm import utils\nprint(json.dumps(utils.VERSION[0]))")) >= 4


def test_who_has_the_real_library_keeps_it() -> None:
    assert run(WITH_THE_REAL_ONE) == [True, True]
