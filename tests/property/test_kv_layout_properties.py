"""Rows keep their tokens whatever is placed, grown and released around them."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_sim import SlabStore

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.slab_rules import SlabRules

MAX_ROWS = 12
sizes = st.one_of(st.integers(1, 300), st.integers(1, 2000))


class LayoutMachine(RuleBasedStateMachine):
    @initialize(
        limit=st.integers(2000, 20_000),
        max_slab=st.sampled_from([1, 1000, 4000]),
        max_resized=st.sampled_from([1, 500, None]),
        keeps_holes=st.booleans(),
        step=st.sampled_from([None, 32, 256]),
        max_slabs=st.sampled_from([None, 1, 3]),
    )
    def start(
        self,
        limit: int,
        max_slab: int,
        max_resized: int | None,
        *,
        keeps_holes: bool,
        step: int | None,
        max_slabs: int | None,
    ) -> None:
        self.layout = KVLayout(
            KVGeometry(1),
            limit,
            SlabRules(
                max_slab,
                max_resized,
                keeps_holes=keeps_holes,
                capacity_step=step,
                max_slabs=max_slabs,
            ),
            MAX_ROWS,
        )
        self.max_slabs = max_slabs
        self.keeps_holes = keeps_holes
        self.store = SlabStore()
        self.held: dict[int, int] = {}
        self.limit = limit
        self.freed: set[int] = set()

    @rule(size=sizes, held_share=st.floats(0, 1))
    def place(self, size: int, held_share: float) -> None:
        free = set(range(MAX_ROWS)) - self.held.keys() - self.freed
        if not free or not self.layout.can_place(size):
            return
        row = min(free)
        self.layout.place(row, size)
        self.held[row] = -int(held_share * size)  # to be written once it has a slot

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.integers(1, 500))
    def grow(self, data: st.DataObject, more: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        size = self.layout.capacity(row) + more
        if self.layout.can_grow(row, size):
            self.layout.grow(row, size)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        self.layout.release(row)
        del self.held[row]
        self.freed.add(row)

    @rule()
    def settle(self) -> None:
        ops = self.layout.settle()
        self.store.apply(ops)
        self.freed.clear()
        assert self.layout.settle() == ()
        assert self.store.held_tokens == self.layout.used_bytes <= self.limit
        self._check_prefixes()
        self._check_contents()
        self._write_new_rows()

    def _check_prefixes(self) -> None:
        used: dict[int, list[int]] = {slab_id: [] for slab_id in self.store.slabs}
        for row in self.held:
            place = self.layout.location(row)
            assert self.store.capacities[place.slab_id] >= self.layout.capacity(row)
            used[place.slab_id].append(place.slot)
        for slots in used.values():
            assert slots
            assert len(slots) == len(set(slots))
            if not self.keeps_holes:
                assert sorted(slots) == list(range(len(slots)))

    def _check_contents(self) -> None:
        for row, held in self.held.items():
            place = self.layout.location(row)
            if held > 0:
                slot = self.store.slabs[place.slab_id][place.slot]
                assert slot[:held] == [row] * held

    def _write_new_rows(self) -> None:
        for row, held in self.held.items():
            if held < 0:
                place = self.layout.location(row)
                self.store.slabs[place.slab_id][place.slot][:-held] = [row] * -held
                self.layout.set_num_tokens(row, -held)
                self.held[row] = -held

    @invariant()
    def counts_its_rows(self) -> None:
        if hasattr(self, "layout"):
            assert self.layout.num_rows == len(self.held)

    def teardown(self) -> None:
        if not hasattr(self, "layout"):
            return
        for row in list(self.held):
            self.layout.release(row)
        self.store.apply(self.layout.settle())
        assert self.layout.num_slabs == self.layout.used_bytes == 0
        assert not self.store.slabs


LayoutMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLayout = LayoutMachine.TestCase
