"""Our engine as a grad-sample mode of Opacus: `make_private(..., grad_sample_mode="lora", wrap_model=False)`.

For those who train with Opacus directly; fedtune's own training does not pass through here. The accountants, the
Poisson loader, `BatchMemoryManager` and checkpoints are Opacus' own, and so is every other grad-sample mode.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import opacus
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fedtune.data.sampling import PoissonSampler
from fedtune.errors import PrivacyError
from fedtune.privacy.clipping import ClippingName
from fedtune.privacy.opacus_hooks import LoraGradSampleHooks
from fedtune.privacy.opacus_optimizer import LoraDPOptimizer
from fedtune.privacy.random import SecureSource

MODE = "lora"
CLIPPING: dict[str, ClippingName] = {"flat": "fixed", "auto-s": "auto-s", "auto-v": "auto-v"}
DISTRIBUTED = (DistributedDataParallel, DifferentiallyPrivateDistributedDataParallel, FSDPModule)


class PrivacyEngine(opacus.PrivacyEngine):  # type: ignore[misc]  # Opacus ships no types
    """`opacus.PrivacyEngine` that knows one more `grad_sample_mode`, "lora"; all other modes are Opacus' unchanged.

    In this mode `make_private` returns (hooks, optimizer, data_loader): the model itself is not wrapped, and
    `hooks.cleanup()` leaves it as it was, which a failing `make_private` also does. `secure_mode=True` draws noise and
    batches from AES-256 in counter mode; Opacus' own needs torchcsprng, which cannot be installed.

    `clipping` is "flat", or with "auto-s" and "auto-v" automatic (see `clip_and_sum`).

    Raises PrivacyError for what this mode does not do (a wrapped or distributed model, clipping by layer) and for what
    would break the promise (`rand_on_empty`: its made-up record stands where a real one may stand, so one record more
    or less changes the sum by up to 2 C).
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        with warnings.catch_warnings():
            if secure_mode:
                warnings.filterwarnings("ignore", message="Secure RNG turned off")
            super().__init__(accountant=accountant, secure_mode=False)
        self.secure_mode = secure_mode
        self._hooks: Any = None
        self._drawn: deque[int] = deque()

    def make_private(self, *, grad_sample_mode: str = "hooks", **options: Any) -> Any:
        """Make the training objects private; arguments and results are those of `opacus.PrivacyEngine.make_private`."""
        self._hooks, self._drawn = None, deque()
        _refuse(_obstacle(options, self.secure_mode) if grad_sample_mode == MODE else _insecure(self.secure_mode))
        try:
            return super().make_private(grad_sample_mode=grad_sample_mode, **options)
        except BaseException:
            if self._hooks is not None:
                self._hooks.cleanup()
            raise

    def _prepare_model(self, module: nn.Module, *, grad_sample_mode: str = "hooks", **options: Any) -> Any:
        if grad_sample_mode != MODE:
            return super()._prepare_model(module, grad_sample_mode=grad_sample_mode, **options)
        self.validate(module=module, optimizer=None, data_loader=None)
        wanted = {key: options[key] for key in ("batch_first", "loss_reduction") if key in options}
        self._hooks = LoraGradSampleHooks(module, **wanted)
        return self._hooks

    def _prepare_data_loader(self, data_loader: Any, *, poisson_sampling: bool, **options: Any) -> Any:
        loader = super()._prepare_data_loader(data_loader, poisson_sampling=poisson_sampling, **options)
        if self._hooks is not None and poisson_sampling:
            sampler = PoissonBatches(loader.batch_sampler, self._drawn, SecureSource() if self.secure_mode else None)
            vars(loader)["batch_sampler"] = sampler  # a loader lets nobody set it, lest its length change
            loader.collate_fn([loader.dataset[0]])  # so that it can form an empty batch before it has seen another
        return loader

    def _prepare_optimizer(self, *, optimizer: Any, grad_sample_mode: str = "hooks", **options: Any) -> Any:
        if grad_sample_mode != MODE:
            return super()._prepare_optimizer(optimizer=optimizer, grad_sample_mode=grad_sample_mode, **options)
        wanted = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction")
        return LoraDPOptimizer(
            optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer,
            hooks=self._hooks,
            clipping=CLIPPING[options.get("clipping", "flat")],
            generator=options.get("noise_generator"),
            secure_mode=self.secure_mode,
            drawn=self._drawn,
            **{key: options[key] for key in wanted if key in options},
        )


class PoissonBatches(UniformWithReplacementSampler):  # type: ignore[misc]  # Opacus ships no types
    """Opacus' Poisson sampler, which also writes down how many records each logical batch drew.

    The draws are Opacus' own, or with a `source` ours at the same rate. `drawn` starts anew with each iteration.
    """

    def __init__(self, sampler: UniformWithReplacementSampler, drawn: deque[int], source: SecureSource | None) -> None:
        super().__init__(
            num_samples=sampler.num_samples,
            sample_rate=sampler.sample_rate,
            generator=sampler.generator,
            steps=sampler.steps,
        )
        self._drawn, self._source = drawn, source

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of one logical batch after another, possibly none."""
        self._drawn.clear()
        for indices in super().__iter__() if self._source is None else self._unpredictable(self._source):
            self._drawn.append(len(indices))
            yield indices

    def _unpredictable(self, source: SecureSource) -> Iterator[list[int]]:
        sampler = PoissonSampler(self.num_samples, self.sample_rate)
        for _ in range(self.steps):
            yield sampler.draw(source).tolist()


def _obstacle(options: Any, secure: bool) -> str:
    """Say what keeps the lora mode from doing what is asked; empty if nothing does."""
    if options.get("wrap_model", True):
        return "it wraps no model; pass wrap_model=False and go on using the model itself"
    if isinstance(options["module"], DISTRIBUTED):
        return "it trains in one process; pass the model without its distributed wrapper"
    if options.get("clipping", "flat") not in CLIPPING:
        return f"clipping is one of {', '.join(CLIPPING)}, over all parameters together; found {options['clipping']!r}"
    if options.get("rand_on_empty"):
        return "rand_on_empty puts a made-up record where a real one may stand: sensitivity 2 C, accounted as C"
    if secure and not options.get("poisson_sampling", True):
        return "secure_mode draws Poisson batches; leave poisson_sampling at True"
    return ""


def _insecure(secure: bool) -> str:
    """Opacus' own modes would take noise from torch's global generator here, and still be called secure."""
    return (
        "secure_mode of Opacus' own modes needs torchcsprng; here it works with the lora mode alone" if secure else ""
    )


def _refuse(reason: str) -> None:
    if reason:
        raise PrivacyError(
            "opacus-mode",
            f"this cannot be made private: {reason}.",
            hint='See docs/opacus.md for what grad_sample_mode="lora" takes.',
        )
