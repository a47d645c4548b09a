"""Rules of slabs, of each back end's kind."""

from __future__ import annotations

from hypothesis import strategies as st

from mlx_lm_server.core.slab_rules import SlabRules

max_slab_bytes = st.sampled_from([1, 512, 4096])

slab_rules = st.one_of(
    st.builds(SlabRules, max_slab_bytes, keeps_holes=st.booleans()),
    st.builds(
        SlabRules,
        max_slab_bytes,
        capacity_step=st.sampled_from([32, 256]),
        max_slabs=st.sampled_from([1, 2, 6]),
    ),
)
