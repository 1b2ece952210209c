"""`grad_sample_mode="lora"` against Opacus' own hooks and optimiser, step by step, and gradients made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.schedulers import ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from scipy.stats import kstest
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from fedtune.errors import PrivacyError
from fedtune.privacy.opacus_mode import PrivacyEngine
from tests.support.adapted import by_tensor, make_training_case

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (7, 2, 5, 1, 3, 6, 4, 7, 2, 3, 5, 6)
C = 0.5
Tiny = Callable[..., Any]


@pytest.fixture
def tiny() -> Tiny:
    return make_training_case


class Records(Dataset[dict[str, torch.Tensor]]):
    """A batch, record by record."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, record: int) -> dict[str, torch.Tensor]:
        return {name: tensor[record] for name, tensor in self.batch.items()}


class Training:
    """A tiny model made private in one grad-sample mode; sampling and noise are the same for every mode."""

    def __init__(self, case: Any, mode: str = "lora", engine: Any = None, **options: Any) -> None:
        self.case, self.engine = case, engine or PrivacyEngine()
        self.reduce = getattr(torch, options.get("loss_reduction", "mean"))
        noise = None if self.engine.secure_mode else torch.Generator().manual_seed(5)
        sampling = torch.Generator().manual_seed(3)
        wanted = {
            "module": case.model,
            "optimizer": torch.optim.SGD([tensor for _, tensor in case.parameters], lr=0.5, momentum=0.9),
            "data_loader": DataLoader(Records(case.batch), batch_size=4, generator=sampling),
            "max_grad_norm": C,
            "noise_generator": noise,
            "grad_sample_mode": mode,
            "wrap_model": False,
        }
        made_for_epsilon = "target_epsilon" in options
        make = self.engine.make_private_with_epsilon if made_for_epsilon else self.engine.make_private
        extra = {} if made_for_epsilon else {"noise_multiplier": 1.0}
        self.hooks, self.optimizer, self.loader = make(**{**wanted, **extra, **options})

    def run(self, batches: Iterable[dict[str, torch.Tensor]] | None = None) -> list[torch.Tensor]:
        """Train on the batches; return the noisy gradient of each logical step."""
        gradients = []
        for batch in self.loader if batches is None else batches:
            if len(batch["labels"]):
                self.reduce(self.case.losses(batch)).backward()
            self.optimizer.step()
            if not self.optimizer._is_last_step_skipped:
                gradients.append(torch.cat([tensor.grad.flatten() for _, tensor in self.case.parameters]))
            self.optimizer.zero_grad()
        return gradients

    def weights(self) -> torch.Tensor:
        return torch.cat([tensor.detach().flatten() for _, tensor in self.case.parameters])


def fill(case: Any, rows: torch.Tensor) -> None:
    """Put rows (B, P) where Opacus' optimiser looks for them."""
    for name, part in by_tensor(case.model, rows).items():
        tensor = case.model.get_parameter(name)
        tensor.grad_sample = part.reshape(-1, *tensor.shape)


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_every_step_equals_that_of_opacus_hooks(tiny: Tiny, name: str, noise: float, reduction: str) -> None:
    """With noise too: the same generator gives the same noise."""
    options: dict[str, Any] = {
        "noise_multiplier": noise,
        "loss_reduction": reduction,
        "poisson_sampling": name != "bert",
    }
    ours, theirs = (Training(tiny(name, lengths=LENGTHS), mode, **options) for mode in ("lora", "hooks"))
    assert type(theirs.optimizer) is DPOptimizer
    pairs = list(zip(ours.run(), theirs.run(), strict=True))
    assert len(pairs) == 3
    assert all(near(one, other) for one, other in pairs)
    assert near(ours.weights(), theirs.weights())
    assert ours.engine.accountant.history == theirs.engine.accountant.history == [(noise, 1 / 3, 3)]
    assert 0 < ours.optimizer.last_sum.clipped < len(LENGTHS)


def test_a_step_equals_that_of_an_unmodified_optimizer_on_gradients_made_by_hand(tiny: Tiny) -> None:
    ours, by_hand = (Training(tiny("llama"), mode, poisson_sampling=False) for mode in ("lora", "no_op"))
    fill(by_hand.case, by_hand.case.loop())
    by_hand.optimizer.step()
    ours.run([ours.case.batch])
    assert near(ours.weights(), by_hand.weights())


def test_automatic_clipping_is_the_step_on_normalised_records(tiny: Tiny) -> None:
    """Records of norm C·n/(n + 0.01), as AUTO-S has them, are within Opacus' clip norm, and stay as they are."""
    ours = Training(tiny("llama"), clipping="auto-s", poisson_sampling=False)
    by_hand = Training(tiny("llama"), "no_op", poisson_sampling=False)
    rows = by_hand.case.loop()
    fill(by_hand.case, rows * C / (rows.norm(dim=1, keepdim=True) + 0.01))
    by_hand.optimizer.step()
    ours.run([ours.case.batch])
    assert near(ours.weights(), by_hand.weights())


def test_the_gradient_of_each_record_stands_on_its_parameter(tiny: Tiny) -> None:
    ours, theirs = (Training(tiny("gpt2"), mode, poisson_sampling=False) for mode in ("lora", "hooks"))
    for each in (ours, theirs):
        each.case.losses(each.case.batch).mean().backward()
    for (_, mine), (_, other) in zip(ours.case.parameters, theirs.case.parameters, strict=True):
        assert mine.grad_sample.shape == (4, *mine.shape)
        assert torch.allclose(mine.grad_sample, other.grad_sample, rtol=1e-9, atol=1e-12)


def test_losses_in_several_backward_passes_add_up_record_by_record(tiny: Tiny) -> None:
    once, parts = (Training(tiny("llama"), loss_reduction="sum", poisson_sampling=False) for _ in range(2))
    once.run([once.case.batch])
    losses = parts.case.losses(parts.case.batch)
    for loss in losses:
        loss.backward(retain_graph=True)
    parts.optimizer.step()
    assert near(parts.weights(), once.weights(), 1e-12)


def test_gradient_checkpointing_changes_nothing(tiny: Tiny) -> None:
    plain, checkpointed = (Training(tiny("llama", lengths=LENGTHS)) for _ in range(2))
    checkpointed.case.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(near(*pair, 1e-12) for pair in zip(plain.run(), checkpointed.run(), strict=True))


@pytest.mark.parametrize("clear_first", [True, False])
def test_the_gradients_may_be_cleared_between_the_call_and_its_backward_pass(tiny: Tiny, clear_first: bool) -> None:
    usual, other = (Training(tiny("llama"), poisson_sampling=False) for _ in range(2))
    usual.run([usual.case.batch])
    if clear_first:
        other.optimizer.zero_grad()
    loss = other.case.losses(other.case.batch).mean()
    other.optimizer.zero_grad()
    loss.backward()
    other.optimizer.step()
    assert torch.equal(usual.weights(), other.weights())


def test_several_physical_batches_make_the_step_of_one(tiny: Tiny) -> None:
    whole, cut = (Training(tiny("llama", lengths=LENGTHS)) for _ in range(2))
    expected = whole.run()
    sizes: list[int] = []
    with BatchMemoryManager(data_loader=cut.loader, max_physical_batch_size=2, optimizer=cut.optimizer) as loader:
        found = cut.run(batch for batch in loader if sizes.append(len(batch["labels"])) is None)
    assert len(sizes) > len(expected) == 3
    assert max(sizes) <= 2
    assert all(near(*pair, 1e-6) for pair in zip(found, expected, strict=True))
    assert cut.engine.accountant.history == whole.engine.accountant.history


class Seldom(Training):
    """Records drawn so seldom that most batches, and the first, are empty."""

    def __init__(self, case: Any, **options: Any) -> None:
        loader = DataLoader(Records(case.batch), batch_size=1, generator=torch.Generator().manual_seed(9))
        super().__init__(case, data_loader=loader, **options)


def test_an_empty_batch_is_a_step_of_noise_alone(tiny: Tiny) -> None:
    seldom = Seldom(tiny("llama"))
    sizes = []
    for batch in seldom.loader:
        before = seldom.weights()
        (gradient,) = seldom.run([batch])
        sizes.append(len(batch["labels"]))
        if not sizes[-1]:
            assert batch["input_ids"].shape == (0, 7)
            assert seldom.optimizer.last_sum.records == 0
            assert kstest((gradient / C).numpy(), "norm").pvalue > 1e-6
        assert not torch.equal(before, seldom.weights())
    assert sizes[0] == 0
    assert sum(sizes) > 0
    assert seldom.engine.accountant.history == [(1.0, 1 / 4, 4)]


def test_calling_the_model_on_an_empty_batch_is_harmless() -> None:
    """Where the model can take one; transformers' cannot. The mean of no losses is NaN, and stays out of the step."""
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3)), batch_size=2)
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=C,
        grad_sample_mode="lora", wrap_model=False,
    )  # fmt: skip
    before = [tensor.clone() for tensor in model.parameters()]
    model(torch.randn(0, 3)).mean().backward()
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_that_of_opacus(tiny: Tiny, accountant: str) -> None:
    ours, theirs = (
        Training(tiny("llama", lengths=LENGTHS), mode, PrivacyEngine(accountant=accountant))
        for mode in ("lora", "hooks")
    )
    ours.run()
    theirs.run()
    assert ours.engine.get_epsilon(1e-5) == theirs.engine.get_epsilon(1e-5) > 0


def test_training_for_a_target_epsilon_spends_it(tiny: Tiny) -> None:
    engine = PrivacyEngine(accountant="rdp")
    target = {"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2, "epsilon_tolerance": 0.1}
    training = Training(tiny("bert", lengths=LENGTHS), engine=engine, **target)
    training.run()
    training.run()
    assert 4.9 <= training.engine.get_epsilon(1e-3) <= 5.0


def test_a_schedule_of_the_noise_is_followed_and_accounted(tiny: Tiny) -> None:
    training = Training(tiny("llama", lengths=LENGTHS))
    schedule = ExponentialNoise(training.optimizer, gamma=0.5)
    for batch in training.loader:
        training.run([batch])
        schedule.step()
    assert [sigma for sigma, _, _ in training.engine.accountant.history] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("mode", ["lora", "hooks"])
def test_a_nan_record_contributes_nothing_where_opacus_loses_the_step(tiny: Tiny, mode: str) -> None:
    training = Training(tiny("llama"), mode, noise_multiplier=0.0, poisson_sampling=False)
    broken = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    (training.case.losses(training.case.batch) * broken).mean().backward()
    training.optimizer.step()
    assert bool(training.weights().isfinite().all()) is (mode == "lora")
    if mode == "lora":
        assert training.optimizer.last_sum.dropped == 1


def test_secure_noise_is_gaussian_and_leaves_torchs_generator_alone(tiny: Tiny) -> None:
    training = Seldom(tiny("llama", 8), engine=PrivacyEngine(secure_mode=True), loss_reduction="sum")
    state = torch.get_rng_state()
    training.optimizer.step()
    noise = torch.cat([tensor.grad.flatten() for _, tensor in training.case.parameters]) / C
    assert kstest(noise.numpy(), "norm").pvalue > 1e-6
    assert torch.equal(torch.get_rng_state(), state)


def test_secure_batches_are_poisson_and_cannot_be_foretold(tiny: Tiny) -> None:
    def sizes() -> list[int]:
        engine = PrivacyEngine(secure_mode=True)
        case = tiny("bert", lengths=LENGTHS * 20)
        loader = DataLoader(Records(case.batch), batch_size=2, generator=torch.Generator().manual_seed(1))
        return [len(batch) for batch in Training(case, engine=engine, data_loader=loader).loader.batch_sampler]

    one, other = sizes(), sizes()
    assert one != other
    assert len(one) == 120
    assert 1.2 < sum(one) / len(one) < 2.8
    assert min(one) == 0


def test_the_model_stays_itself(tiny: Tiny, tmp_path: Path) -> None:
    training = Training(tiny("llama"), poisson_sampling=False)
    model = training.case.model
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert model.config.model_type == "llama"
    written = model.generate(input_ids=torch.ones(1, 2, dtype=torch.long), max_new_tokens=2, do_sample=False)
    assert written.shape[1] <= 4
    training.run([training.case.batch])


def test_cleanup_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    case = tiny("gpt2")

    def attributes() -> list[Any]:
        hooks = [(len(layer._forward_pre_hooks), set(vars(layer))) for layer in case.model.modules()]
        return [*hooks, *(set(vars(tensor)) for tensor in case.model.parameters())]

    before = attributes()
    training = Training(case)
    training.run()
    training.hooks.cleanup()
    assert attributes() == before
    Training(case, "hooks").run()


def test_the_state_of_training_survives_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    whole, first, second = (Training(tiny("llama", lengths=LENGTHS), noise_multiplier=0.0) for _ in range(3))
    whole.run()
    whole.run()
    first.run()
    first.engine.save_checkpoint(path=tmp_path / "state", module=first.case.model, optimizer=first.optimizer)
    second.engine.load_checkpoint(path=tmp_path / "state", module=second.case.model, optimizer=second.optimizer)
    second.loader.batch_sampler.generator.set_state(first.loader.batch_sampler.generator.get_state())
    second.run()
    assert torch.equal(second.weights(), whole.weights())
    assert second.engine.accountant.history == whole.engine.accountant.history


def test_every_other_mode_is_opacus_own(tiny: Tiny) -> None:
    wrapped = Training(tiny("llama"), "hooks", wrap_model=True)
    assert type(wrapped.optimizer) is DPOptimizer
    assert type(wrapped.loader) is DPDataLoader
    assert type(wrapped.hooks).__module__.startswith("opacus.")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"wrap_model": True}, "wraps no model"),
        ({"clipping": "per_layer"}, "over all parameters together"),
        ({"max_grad_norm": [1.0, 1.0]}, "one clip norm"),
        ({"rand_on_empty": True}, "made-up record"),
        ({"batch_first": False}, "first dimension"),
        ({"engine": PrivacyEngine(secure_mode=True), "poisson_sampling": False}, "Poisson"),
        ({"engine": PrivacyEngine(secure_mode=True), "mode": "hooks"}, "torchcsprng"),
    ],
)
def test_what_the_mode_cannot_do_is_refused_and_leaves_nothing_behind(tiny: Tiny, options: Any, reason: str) -> None:
    case = tiny("llama")
    with pytest.raises(PrivacyError, match=reason):
        Training(case, **options)
    assert not any("forward" in vars(layer) for layer in case.model.modules())
    assert not any(hasattr(tensor, "grad_sample") for tensor in case.model.parameters())


def test_an_optimizer_of_some_parameters_is_refused(tiny: Tiny) -> None:
    case = tiny("llama")
    some = torch.optim.SGD([tensor for _, tensor in case.parameters[1:]], lr=0.1)
    with pytest.raises(PrivacyError, match=r"optimiser holds .*privacy\.unlisted"):
        Training(case, optimizer=some)


def test_parameter_groups_in_any_order_get_their_own_gradients(tiny: Tiny) -> None:
    weights = []
    for mode in ("lora", "hooks"):
        case = tiny("llama")
        turned = [{"params": [tensor]} for _, tensor in reversed(case.parameters)]
        training = Training(case, mode, poisson_sampling=False, optimizer=torch.optim.SGD(turned, lr=0.5))
        training.run([case.batch])
        weights.append(training.weights())
    assert near(*weights)


def test_a_parameter_that_is_unfrozen_later_is_refused_and_not_trained_without_privacy(tiny: Tiny) -> None:
    case = tiny("llama")
    frozen = next(tensor for tensor in case.model.parameters() if not tensor.requires_grad)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    training = Training(case, optimizer=optimizer, poisson_sampling=False)
    frozen.requires_grad_()
    with pytest.raises(PrivacyError, match=r"privacy\.unlisted"):
        training.run([case.batch])


def test_a_distributed_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(PrivacyError, match="one process"):
            Training(tiny("llama"), module=DistributedDataParallel(nn.Linear(2, 2)))
    finally:
        distributed.destroy_process_group()
