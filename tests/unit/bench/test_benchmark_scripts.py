"""The parts of benchmarks/ that decide what a number means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import claims, models
from benchmarks.__main__ import main
from benchmarks.claims import Claim
from benchmarks.contenders.load import Load, measure

from mlx_lm_server.bench.words import WORDS


class Script:
    """A contender whose steps are given."""

    kv_bytes_per_token = 10

    def __init__(self, *steps: list[int]) -> None:
        self._steps = steps

    def generate(self, load: Load) -> Iterator[list[int]]:
        yield from self._steps


class Memory:
    """An allocator whose peak is 500 until somebody resets it, and 300 after."""

    def __init__(self) -> None:
        self.peak = 500

    def get_active_memory(self) -> int:
        return 100

    def get_peak_memory(self) -> int:
        return self.peak

    def reset_peak_memory(self) -> None:
        self.peak = 300


def test_decoding_is_timed_while_all_rows_decode() -> None:
    script = Script([0], [0, 1], [], [0, 1], [0, 1], [1])
    measured = measure(script, Load((5, 7), 4, seed=0), Memory())
    assert measured.total_tokens == 8
    assert measured.decode_tokens == 4
    assert measured.prompt_tokens == 12
    assert measured.live_kv_bytes == (12 + 8) * 10
    assert measured.peak_bytes == 200


def test_loads_are_the_same_for_the_same_seed_only() -> None:
    load = Load((5, 7), 4, seed=3, own_sampling=True)
    assert load.prompts == Load((5, 7), 4, seed=3).prompts
    assert load.prompts != Load((5, 7), 4, seed=4).prompts
    assert len({s.seed for s in load.sampling}) == 2
    assert all(s.temperature == 0 for s in Load((5, 7), 4, seed=3).sampling)


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (Claim("speed", 1.2, at_least=1.2), True),
        (Claim("speed", 1.1, at_least=1.2), False),
        (Claim("time", 4.1, at_most=4.0), False),
        (Claim("shown", 4.1), True),
    ],
)
def test_a_claim_holds_within_its_bound(claim: Claim, holds: bool) -> None:
    assert claim.holds is holds


def test_results_name_no_machine_and_keep_quick_ones_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    path = claims.save("part", [Claim("speed", 1.0, at_least=2.0)], {}, is_quick=True)
    assert path.name == "part-quick.json"
    document = json.loads(path.read_text())
    assert document["claims"][0]["holds"] is False
    assert document["machine"]["cores"] >= 1
    assert str(Path.home()) not in path.read_text()


def test_the_bench_model_has_a_token_for_each_word(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    models.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(f" {word}" for word in WORDS)
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(WORDS)
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == models.VOCAB_SIZE


def test_the_scripts_are_listed_and_unknown_ones_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "serving" in listed
    assert "long-row" in listed
    assert main(["nonsense"]) == 2
