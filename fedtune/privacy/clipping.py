"""Per-record clipping: rows of per-record gradients in, a sum of known sensitivity out.

Knows nothing of models, losses, sampling or noise. A row is whatever one privacy unit contributed, already flat.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedtune.errors import PrivacyError

ClippingName = Literal["fixed", "auto-s", "auto-v"]

# What AUTO-S adds to every norm, in the units of the gradients and independent of C.
GAMMA = 0.01
# On a CPU squares are summed in float32 in pieces of so many, and in float64 from there on. How torch adds up so few
# depends neither on the other rows nor on where the row lies.
PIECE = 64
# Such a sum of float32 squares is wrong by a factor within 1 ± 64·2⁻²⁴, in whatever order it is added up; a norm
# therefore by 1 ± 32·2⁻²⁴, and 2⁻²⁴ more for the root: by less than 2e-6. Rows are scaled to C·(1 - HEADROOM).
HEADROOM = 2e-6
# A norm at or below it may have lost squares to underflow; one above it has lost less than 1e-12 of itself.
SMALL = 1e-8
# Rows are summed in column blocks of about so many numbers: their float64 copy stays in the processor's cache. A GPU
# has no such cache, and is launched less often.
BLOCK = 2**16
DEVICE_BLOCK = 2**22


@dataclass(frozen=True, slots=True)
class ClippedSum:
    """A sum of clipped rows that carries its own sensitivity.

    `total` (P,) is float64. Adding or removing one row changes it by at most `sensitivity`·(1 + 1e-6) in L2 norm.
    `records` rows were seen, `clipped` of them scaled down, `dropped` of them not finite and left out. The three counts
    are as private as the records: they stay at the site.
    """

    total: Tensor
    sensitivity: float
    records: int
    clipped: int
    dropped: int

    @classmethod
    def zero(cls, parameters: int, clip_norm: float, device: torch.device | str = "cpu") -> ClippedSum:
        """Return the sum of no rows: what an empty Poisson batch contributes before the noise."""
        _check(clip_norm)
        return cls(torch.zeros(parameters, dtype=torch.float64, device=device), clip_norm, 0, 0, 0)

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Join the sums of two disjoint sets of records; one unit's rows must never stand in both.

        Where one of the sets is empty the result is the other sum itself, which is not copied.
        """
        if self.sensitivity != other.sensitivity or self.total.shape != other.total.shape:
            raise PrivacyError(
                "mixed-sums",
                f"sums of sensitivity {self.sensitivity} over {tuple(self.total.shape)} and of {other.sensitivity} "
                f"over {tuple(other.total.shape)} cannot be added.",
            )
        if not (self.records and other.records):
            return self if self.records else other
        return replace(
            self,
            total=self.total + other.total,
            records=self.records + other.records,
            clipped=self.clipped + other.clipped,
            dropped=self.dropped + other.dropped,
        )


def clip_and_sum(rows: Tensor, clip_norm: float, method: ClippingName = "fixed") -> ClippedSum:
    """Scale each row (B, P) to an L2 norm of at most C and sum: Σ_i rows_i · s(‖rows_i‖).

    ==========  ===================  =======================  ==================================================
    method      s(n)                 norm of a contribution   source
    ==========  ===================  =======================  ==================================================
    `fixed`     min(1, C/n)          min(n, C)                Abadi et al. 2016
    `auto-s`    C/(n + γ), γ = 0.01  C·n/(n + γ), below C     Bu et al., arXiv 2206.07136
    `auto-v`    C/n                  C for every row          the same
    ==========  ===================  =======================  ==================================================

    Under the automatic methods C only scales the step: 2 C with half the learning rate is the same training. γ is not
    relative to C: it is a gradient norm, in the units of the loss, below which rows count for less; at n = γ a row has
    half of its weight. Sensitivity C under adding or removing one row, for every method and all rows.

    What a row contributes depends on that row alone. Norms are exact to 2e-6 (in bf16 they were measured 0.4 % to
    0.6 % wrong), and C(1 - 2e-6) is what rows are scaled to; products and the sum are float64 (a float32 sum of many
    rows rounds by more than 1e-6 C when one more row shifts it).

    ========================================  =============================================================
    row                                       contribution
    ========================================  =============================================================
    `fixed`, norm at most C(1 - 4e-6)         the row, unchanged
    larger, also where its squares overflow   the row scaled to norm C(1 - 2e-6) ± 2e-6 C, counted as clipped
    so small that its squares underflow       as its exact norm says; below 1e-290 (float64) `auto-v` gives less
    all zeros                                 zeros, not counted as clipped, with every method
    a NaN or an infinity anywhere             zeros, counted as dropped
    float64 with a norm above 1.8e308         zeros, counted as dropped
    B = 0                                     a zero sum
    bfloat16, float16                         as the same row in float32
    ========================================  =============================================================

    `rows` are read, never written. Raises PrivacyError for a clip norm outside [1e-9, 1e9] or an unknown method.
    """
    _check(clip_norm)
    if rows.ndim != 2:  # noqa: PLR2004 - (B, P)
        raise PrivacyError("rows", f"per-record gradients must be (records, parameters), found {tuple(rows.shape)}.")
    norms = _norms(rows)
    trusted = (norms > SMALL) & norms.isfinite()
    scales = _scales(norms, clip_norm, method)
    clipped, doubtful = torch.stack([(scales < 1).sum(), (~trusted).sum()]).tolist()  # the one wait for a device
    if doubtful == 0:
        return ClippedSum(_weighted_sum(rows, scales, None), clip_norm, len(rows), clipped, dropped=0)
    norms[~trusted] = _careful_norms(rows[~trusted])
    keep = norms.isfinite()
    scales = _scales(norms[keep], clip_norm, method)
    return ClippedSum(
        _weighted_sum(rows, scales, keep),
        clip_norm,
        records=len(rows),
        clipped=int((scales < 1).sum()),
        dropped=len(rows) - len(scales),
    )


def _check(clip_norm: float) -> None:
    """Outside these bounds squares of gradients under- or overflow before the clipping can help."""
    if not 1e-9 <= clip_norm <= 1e9:  # noqa: PLR2004 - named in the message
        raise PrivacyError(
            "clip-norm",
            f"the clip norm is {clip_norm}; it must lie between 1e-9 and 1e9.",
            hint="Set privacy.clip_norm, usually between 0.01 and 10.",
        )


def _norms(rows: Tensor) -> Tensor:
    """L2 norms (B,) in float64, right to 2e-6 where they are finite and above SMALL."""
    wide = rows.shape[1] // PIECE * PIECE
    pieces = rows[:, :wide].unflatten(1, (wide // PIECE, PIECE)), rows[:, None, wide:]
    # A GPU's order of adding up does depend on where the row lies; it also takes float64 sums without a copy.
    dtype = torch.promote_types(rows.dtype, torch.float32) if rows.device.type == "cpu" else torch.float64
    parts = [torch.linalg.vector_norm(each, dim=2, dtype=dtype) for each in pieces]
    norms: Tensor = torch.linalg.vector_norm(torch.cat(parts, dim=1), dim=1, dtype=torch.float64)
    return norms


def _careful_norms(rows: Tensor) -> Tensor:
    """L2 norms (B,) in float64 without over- or underflow; NaN where a row is not finite."""
    norms = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for norm, row in zip(norms, rows, strict=True):
        largest = row.double().abs().amax().clamp(min=1e-300)  # of a row of zeros, which stays so
        norm.copy_(largest * torch.linalg.vector_norm(row.double() / largest))
    return norms


def _scales(norms: Tensor, clip_norm: float, method: ClippingName) -> Tensor:
    """Return the factors of the rows (B,); a row of zeros gets any finite one."""
    limit = clip_norm * (1 - HEADROOM)
    if method == "fixed":
        return limit / norms.clamp(min=limit)
    if method == "auto-s":
        return limit / (norms + GAMMA)
    if method == "auto-v":
        return limit / norms.clamp(min=1e-290)
    raise PrivacyError("clipping-method", f"there is no clipping {method!r}.", hint="fixed, auto-s or auto-v")


def _weighted_sum(rows: Tensor, scales: Tensor, keep: Tensor | None) -> Tensor:
    """Σ_i scales_i · rows_i over the kept rows, (P,) in float64; the others are left out, because 0 · NaN is NaN."""
    total = torch.empty(rows.shape[1], dtype=torch.float64, device=rows.device)
    block_size = BLOCK if rows.device.type == "cpu" else DEVICE_BLOCK
    width = max(1, block_size // max(1, len(rows)))
    for block, out in zip(rows.split(width, dim=1), total.split(width), strict=True):
        torch.mv((block if keep is None else block[keep]).double().T, scales, out=out)
    return total
