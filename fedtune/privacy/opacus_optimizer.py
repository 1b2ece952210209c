"""Opacus' optimiser on flat rows: our clipping, one noise draw a logical batch, then the wrapped optimiser's step.

Everything that Opacus calls (`step`, virtual steps, step hooks, schedulers of noise and clip norm, checkpoints) is its
own. Knows nothing of models or of how rows are made.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedtune.errors import PrivacyError
from fedtune.privacy.clipping import ClippedSum, ClippingName, clip_and_sum
from fedtune.privacy.noise import add_noise, mean_without_noise
from fedtune.privacy.opacus_hooks import LoraGradSampleHooks
from fedtune.privacy.random import Floats, NoiseName, RandomSource, SecureSource


class LoraDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """`DPOptimizer` for the rows of `LoraGradSampleHooks`; its arguments mean what they mean in Opacus.

    A step without a call of the model before it is the step of an empty batch: noise alone. A NaN record contributes
    zero (see `clip_and_sum`). Noise is N(0, σ²C²) on each coordinate, added in float64 and rounded to a grid; it comes
    from `generator` or torch's global one, drawn as Opacus draws it, or with `secure_mode` from `SecureSource`.

    `drawn` are the sizes of the logical batches that a sampler has drawn and no step has used, oldest first: a step
    over another number of records raises PrivacyError. So does a step before `zero_grad()` has cleared the last one,
    and a parameter that this optimiser does not share with the hooks. `last_sum` tells how many records the last step
    clipped and dropped; the counts are as private as the records.
    """

    def __init__(  # noqa: PLR0913 - Opacus' own arguments, by keyword
        self,
        optimizer: torch.optim.Optimizer,
        *,
        hooks: LoraGradSampleHooks,
        max_grad_norm: float,
        clipping: ClippingName = "fixed",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        drawn: deque[int] | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(max_grad_norm, float | int):
            raise PrivacyError("clip-norm", f"one clip norm bounds all parameters together; found {max_grad_norm!r}.")
        super().__init__(
            optimizer, max_grad_norm=max_grad_norm, generator=generator, secure_mode=secure_mode, **settings
        )
        _refuse_other_parameters(self.params, hooks)
        self.last_sum: ClippedSum | None = None
        self._hooks, self._clipping = hooks, clipping
        self._source: RandomSource = (
            SecureSource() if secure_mode else TorchSource(self.params, hooks.tensors, generator)
        )
        self._drawn: deque[int] = deque() if drawn is None else drawn
        self._sum: ClippedSum | None = None
        self._is_spent = False

    @property
    def accumulated_iterations(self) -> int:
        """One: physical batches make one logical batch, and a second logical batch before a step is refused."""
        return 1

    @property
    def grad_samples(self) -> list[Tensor]:
        """Each parameter's gradients (records, *shape); no records in an empty batch."""
        return self._hooks.grad_samples

    def clip_and_accumulate(self) -> None:
        """Clip the records of the pass and add them to the sum of the logical batch."""
        if self._is_spent:
            raise PrivacyError(
                "not-cleared",
                "the gradients of the last step have not been cleared; one record would be counted twice.",
                hint="Call optimizer.zero_grad() after optimizer.step().",
            )
        _refuse_other_parameters(self.params, self._hooks)  # one unfrozen since would be trained without privacy
        clipped = clip_and_sum(self._hooks.take(), self.max_grad_norm, self._clipping)
        self._sum = clipped if self._sum is None else self._sum + clipped

    def add_noise(self) -> None:
        """Put the noisy mean (or sum) of the logical batch into `p.grad`."""
        clipped, self._sum = self._sum, None  # a refused sum is gone: a second attempt is a step of noise alone
        assert clipped is not None  # noqa: S101 - pre_step clips first
        self._refuse_miscounted(clipped.records)
        self.last_sum, self._is_spent = clipped, True
        arranged = replace(clipped, total=self._hooks.arrange(clipped.total))
        denominator = float(self.expected_batch_size) if self.loss_reduction == "mean" else 1.0
        if self.noise_multiplier:
            gradient = add_noise(arranged, self.noise_multiplier, self._source, denominator)
        else:
            gradient = mean_without_noise(arranged.total, denominator)
        tensors = self._hooks.tensors
        for tensor, part in zip(tensors, gradient.mean.split([one.numel() for one in tensors]), strict=True):
            tensor.grad = part.view_as(tensor).to(tensor.dtype)

    def scale_grad(self) -> None:
        """Do nothing: `add_noise` has divided by the expected batch size."""

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 - see below
        """Forget gradients, and the sum unless it waits for more physical batches.

        `p.grad` is None afterwards whatever `set_to_none` says: zeros could not be told from a gradient that went past
        the layers.
        """
        self._hooks.clear()
        self.original_optimizer.zero_grad(set_to_none=True)
        if not self._is_last_step_skipped:
            self._sum, self._is_spent = None, False

    def _refuse_miscounted(self, records: int) -> None:
        drawn = self._drawn.popleft() if self._drawn else records
        if drawn != records:
            raise PrivacyError(
                "miscounted-records",
                f"the loader drew {drawn} records for this step, and the model was called with {records}.",
                hint="Call the model with one row a record, step on every batch, also an empty one, and read records "
                "for other purposes through a loader of their own.",
            )


class TorchSource:
    """Torch's generator as a source of normals for all parameters at once: the very numbers that Opacus would draw.

    They are drawn for one parameter of the optimiser after another, and stand in the order of `tensors`.
    """

    name: NoiseName = "seeded"

    def __init__(self, drawn_for: list[Tensor], tensors: list[Tensor], generator: torch.Generator | None) -> None:
        self._drawn_for, self._tensors, self._generator = drawn_for, tensors, generator

    def uniform(self, n: int) -> Floats:
        """Return n independent uniforms."""
        drawn: Floats = torch.rand(n, generator=self._generator, dtype=torch.float64).numpy()
        return drawn

    def normal(self, n: int) -> Floats:
        """Return standard normals, one for each of the parameters' n numbers."""
        parts = {id(tensor): self._like(tensor) for tensor in self._drawn_for}
        drawn: Floats = torch.cat([parts[id(tensor)] for tensor in self._tensors]).double().cpu().numpy()
        if len(drawn) != n:
            raise PrivacyError("noise", f"{n} normals were asked for, and the parameters have {len(drawn)} numbers.")
        return drawn

    def _like(self, tensor: Tensor) -> Tensor:
        kind = torch.promote_types(tensor.dtype, torch.float32)
        return torch.normal(
            0.0, 1.0, tensor.shape, generator=self._generator, dtype=kind, device=tensor.device
        ).reshape(-1)


def _refuse_other_parameters(tensors: list[Tensor], hooks: LoraGradSampleHooks) -> None:
    if sorted(map(id, tensors)) != sorted(map(id, hooks.tensors)):
        raise PrivacyError(
            "unlisted",
            f"the optimiser holds {len(tensors)} trainable parameters and the model has {len(hooks.tensors)}; each of "
            "the model's must be trained, or frozen before make_private.",
            hint="Call requires_grad_(False) on what is not to be trained.",
        )
