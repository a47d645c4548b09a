"""When a forward is submitted: late, after the last one has ended, or early, before it has.

Late, the device has nothing to do while the host reads tokens and submits. Early, it does not wait;
but what is left of the last forward still holds its slabs, and a slab that is held is copied before
it is written (docs/adr/0002). Both are timed at load.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm_server.core.memory_ledger import format_bytes

# Of a step, what has to be gained: two runs of one thing differ by as much.
LEAST_GAIN_SHARE = 0.03
# Of the slabs in a step, what may be held more while they are copied.
MOST_COPIES = 1.25
# Where so little was held more, nothing was copied, if the device was behind: a large slab took so
# much longer than a small one. Else the last step might have ended before the next was submitted.
NO_COPIES, BEHIND = 0.05, 1.2
# Of what is free for K and V, the part that copies may take.
RESERVED_PART = 16
UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class Trial:
    """Steps over a slab of so many bytes: the seconds of one, and the memory's peak beyond what is
    held."""

    slab_bytes: int
    late_s: float
    early_s: float
    late_peak_bytes: int
    early_peak_bytes: int

    @property
    def gained_s(self) -> float:
        """Returns what a step gains by being submitted early; negative where it loses."""
        return self.late_s - self.early_s

    @property
    def gains(self) -> bool:
        return self.gained_s >= LEAST_GAIN_SHARE * self.late_s


@dataclass(frozen=True, slots=True)
class Submitting:
    """Both ways over a small slab and a large one, of which rows see half."""

    small: Trial
    large: Trial

    @property
    def early_slab_bytes(self) -> int | None:
        """Steps are submitted early while their slabs hold at most so many bytes: as many as both
        ways take equally long with, on the line between the two trials, and no more than was tried
        unless nothing is copied. None where no step is."""
        small, large = self.small, self.large
        if not small.gains or self._copies(early=True) > MOST_COPIES:
            return None
        if large.gains and not self.copies_early:
            return UNBOUNDED
        share = small.gained_s / (small.gained_s - min(large.gained_s, 0.0))
        return small.slab_bytes + int(share * (large.slab_bytes - small.slab_bytes))

    @property
    def copies_early(self) -> bool:
        """Returns whether a second copy of the slabs in an early step has to be counted."""
        is_behind = self.large.early_s > BEHIND * self.small.early_s
        return self.large.slab_bytes > 0 and not (
            is_behind and self._copies(early=True) < NO_COPIES
        )

    @property
    def writes_in_place(self) -> bool:
        """Returns whether steps that are submitted late copy no slabs."""
        return self._copies(early=False) < 0.5

    def describe(self) -> str:
        small_ms, large_ms = (1000 * trial.gained_s for trial in (self.small, self.large))
        in_place = "in place" if self.writes_in_place else "NOT in place, as it should be"
        return (
            f"early steps save {small_ms:.2f} ms of {1000 * self.small.late_s:.2f} ms, over "
            f"{format_bytes(self.large.slab_bytes)} of slabs {large_ms:.2f} ms, and take "
            f"{self._copies(early=True):.1f} times their slabs; late ones write {in_place}"
        )

    def _copies(self, *, early: bool) -> float:
        """Returns how often slabs were held more than once, at the memory's peak."""
        small, large = self.small, self.large
        peaks = [t.early_peak_bytes if early else t.late_peak_bytes for t in (small, large)]
        return (peaks[1] - peaks[0]) / max(1, large.slab_bytes - small.slab_bytes)


@dataclass(frozen=True, slots=True)
class EarlySteps:
    """Which steps are submitted early: over slabs of at most so many bytes, and together with the
    step under way of at most so many tokens, whose activations are held at once.
    `reserve_bytes` is what else is held more."""

    max_slab_bytes: int = 0
    max_tokens: int = 0
    reserve_bytes: int = 0

    def allow(self, slab_bytes: int, num_tokens: int) -> bool:
        return slab_bytes <= self.max_slab_bytes and num_tokens <= self.max_tokens

    def describe(self) -> str:
        if self.max_tokens == 0:
            return "late"
        if self.max_slab_bytes >= UNBOUNDED:
            return "early"
        return f"early over slabs of up to {format_bytes(self.max_slab_bytes)}, else late"


NEVER = EarlySteps()
ALWAYS = EarlySteps(UNBOUNDED, UNBOUNDED)


def early_steps(
    measured: Submitting, other_bytes: int, free_bytes: int, max_tokens: int
) -> EarlySteps:
    """Returns which steps are submitted early: of those that are worth it the ones whose second
    copy takes, with `other_bytes`, no more than a share of what is free."""
    slab_bytes = measured.early_slab_bytes
    most_bytes = free_bytes // RESERVED_PART - other_bytes
    if slab_bytes is None or most_bytes < 0:
        return NEVER
    if not measured.copies_early:
        return EarlySteps(slab_bytes, max_tokens, other_bytes)
    copied_bytes = min(slab_bytes, most_bytes)
    return EarlySteps(copied_bytes, max_tokens, copied_bytes + other_bytes)


# As if early steps had been measured to be worth it, whatever they copy.
WORTH_IT = Submitting(Trial(0, 1.0, 0.5, 0, 0), Trial(UNBOUNDED, 1.0, 0.5, 0, UNBOUNDED))
