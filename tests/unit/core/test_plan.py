"""Plans are values: they can be sent to others."""

from __future__ import annotations

import typing

import msgspec
import pytest

from mlx_lm_server.core import plan as plans
from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import JoinedRow, RowWork, StepPlan, decode_plan, encode_plan
from mlx_lm_server.core.tier import Label
from mlx_lm_server.protocol import SamplingParams, ThinkingBudget

LABEL = Label(b"\x00\xff", b"parent", (1, 2), 18, is_state=True)
PLACES = (Place(3, 4), Place(5, 6))
# By the names of their fields, what operations of every kind can be made of.
VALUES = {
    "places": PLACES,
    "moves": (PLACES, PLACES),
    "labels": (LABEL, LABEL),
    "label": LABEL,
    "names": (b"\x80", b"\x81"),
    "name": b"\x80\x81",
    "slots": (1, 2),
    "numbers": (0, 9),
}
KINDS = [
    kind for union in (plans.KVOp, plans.SaveOp, plans.LoadOp) for kind in typing.get_args(union)
]


def example(kind: type[plans.Operation]) -> plans.Operation:
    names = [field.name for field in msgspec.structs.fields(kind)]
    return kind(*(VALUES.get(name, 7 + n) for n, name in enumerate(names)))


def plan_with(op: plans.Operation) -> StepPlan:
    unions = (("kv_ops", plans.KVOp), ("saves", plans.SaveOp), ("loads", plans.LoadOp))
    where = next(name for name, union in unions if type(op) in typing.get_args(union))
    return StepPlan(1, **{where: (op,)})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_plan_with_an_operation_comes_back_as_it_was(kind: type[plans.Operation]) -> None:
    plan = plan_with(example(kind))
    again = decode_plan(encode_plan(plan))
    assert again == plan
    assert repr(again) == repr(plan), "of the same types, places too"


def test_every_operation_is_tried() -> None:
    found = {
        kind
        for kind in vars(plans).values()
        if isinstance(kind, type) and issubclass(kind, plans.Operation)
    }
    assert found - {plans.Operation} == set(KINDS)


def test_rows_and_their_work_come_back_as_they_were() -> None:
    sampling = SamplingParams(
        max_tokens=9,
        seed=1 << 60,
        logit_bias={5: -1.5},
        bad_words=((1, 2), (3,)),
        stop_token_ids=(7,),
        thinking=ThinkingBudget(max_tokens=3, forced_ids=(4,), start_ids=(1,), end_ids=(2,)),
    )
    plan = StepPlan(
        5,
        left_rows=(1, 2),
        joined_rows=(JoinedRow("name", 3, (1, 2, 3), (4,), sampling),),
        decodes=(RowWork(0, 1, 2, 30, is_awaited=True),),
        chunks=(RowWork(3, 1, 3, 0, (1, 2), yields=0), RowWork(4, 1, 4, 8, (5, 6, 7), yields=3)),
    )
    again = decode_plan(encode_plan(plan))
    assert again == plan
    assert repr(again) == repr(plan)


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_plan(encode_plan(StepPlan(1))[:-3])
    with pytest.raises(msgspec.ValidationError):
        decode_plan(msgspec.msgpack.encode([1, ["x"]]))
