"""The messages: what a driver sends to a worker and what comes back.

Everything here is a frozen dataclass of plain numbers and strings, so it travels as a few hundred
bytes of JSON. Bounds are written once, as annotations; `config.py` enforces them on user input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
MethodName = Literal["noisy", "sparse", "stochastic"]
Schedule = Literal["decay", "one_cycle", "constant", "steps", "cosine"]
Structure = Literal["weight", "unit", "neuron", "channel", "layer"]
Annealing = Literal["linear", "cosine", "exponential"]
Probabilities = Literal["temperature", "uniform", "mixture"]


def derive(seed: int, *path: str | int) -> int:
    """A 62-bit seed for one purpose, from the run's seed and the purpose's name.

    Independent streams without bookkeeping: nothing has to be drawn in a given order, so any child
    or epoch can be made again alone.
    """
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


@dataclass(frozen=True)
class Described:
    """What can be written as JSON, to be compared with what a result or checkpoint was made of."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one network is trained: enough to do it again, given data and a seed."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epochs: Annotated[int, Ge(0)]
    """passes over the training images"""
    batch_size: Count = 128
    """global: images per optimizer step, over all devices together"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Schedule = "decay"
    """decay: constant half way, then linear to 1 % (parent); one_cycle: children (Fig 5.3);
    steps: a tenth after 50 %, a hundredth after 90 % (sections 4.3.2, 6.3.1); cosine: half of one,
    to zero"""
    lr: Positive = 0.1
    """learning rate; the peak of it for one_cycle"""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """of SGD; one_cycle moves it between 0.95 and 0.85 instead"""
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """of forward and backward pass in training; weights and optimizer state stay float32"""
    compile: bool = False
    """by torch.compile: other last digits, faster where a graph is used for long"""


@dataclass(frozen=True, kw_only=True)
class ChildSpec(Described):
    """A child is a recipe: with the parent's weights it gives the child, bit for bit.

    Raises:
        ValueError: there is no such part.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    id: str
    """unique in a run and safe as a file name: `sparse-003`"""
    method: MethodName
    group: str = ""
    """children that are also reported together; default: the method"""
    seed: int
    """of mask and noise; siblings of one partition or mirrored pair share it"""
    density: Fraction
    """fraction of ones in the drawn mask: perturbed by noise, or kept (1 - sparsity)"""
    draw: Literal["exact", "bernoulli"]
    part: int = 0
    """which part of the partition, 0 to parts - 1"""
    parts: int = 1
    """1: no partition; 2: mask and complement; k: k parts of 1/k each"""
    mask_classifier: bool = False
    """also mask the last layer"""
    whole: tuple[str, ...] = ()
    """weights that no mask touches, by name or pattern (`backbone.*`)"""
    structure: Structure = "weight"
    """what is drawn: single weights; output units of linear layers (neuron), of convolutions
    (channel) or of both (unit), which are then really removed; whole layers (section 3.2.1)"""
    scope: Literal["local", "global"] = "local"
    """density holds in every layer, or over all of them together"""
    criterion: Literal["random", "magnitude"] = "random"
    """which are kept: by chance, or the largest by L1 norm in the parent"""
    sign: Literal[1, -1] = 1
    """-1 for the mirrored sibling (noisy)"""
    mean: float = 0.0
    """of the noise"""
    sigma: float = 0.0
    """standard deviation of the noise, in units of the weights"""
    sigmas: tuple[float, ...] = ()
    """of each layer that may be masked, in the network's order; then `sigma` is not read"""
    kl_target: float | None = None
    """divergence from the parent, in nats, that sigma was solved for; not read when spawning"""
    relative: bool = False
    """mean and sigma are in units of each tensor's standard deviation"""
    prune_epochs: Annotated[int, Ge(0)] = 0
    """epochs over which weights are removed step by step; 0: at once (sparse)"""
    probabilities: Probabilities = "temperature"
    """how keep-probabilities start (stochastic): eq. 6.6; eq. 6.2.1, uniform; eq. 6.5, Gaussians"""
    tau: float = 0.0
    """initial temperature (stochastic)"""
    two_sided: bool = False
    """weights inside the subnetwork are also left out at times (section 6.2.2)"""
    mixture: tuple[float, float, float, float] = (0.25, 0.1, 0.75, 0.1)
    """mean and standard deviation of P outside, then inside the subnetwork (eq. 6.5)"""
    anneal: Annealing = "linear"
    """shape of the temperature's fall"""
    anneal_epochs: float = 0.0
    """epochs until the temperature is zero"""
    bag: Annotated[float, Gt(0), Le(1)] = 1.0
    """fraction of the training images that this child is tuned on (NP+BAG)"""
    recompute_norm: bool = False
    """batch-norm statistics of the spawned child from training images, before tuning"""
    training: Training | None = None
    """how the child is tuned; None: used as spawned"""
    training_seed: int = 0
    """of batch order, augmentation, dropout and Bernoulli masks"""

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part: {self.part} of {self.parts} parts does not exist")

    @property
    def label(self) -> str:
        return self.group or self.method

    @property
    def epochs(self) -> int:
        return self.training.epochs if self.training else 0

    @property
    def solved(self) -> bool:
        """Is the recipe whole? One with a KL target needs its sigma first."""
        return self.kl_target is None or self.sigma > 0


@dataclass(frozen=True, kw_only=True)
class Fit(Described):
    """Train a network from its initial weights: the parent, or a single model beside it."""

    id: str
    training: Training
    seed: int

    @property
    def epochs(self) -> int:
        return self.training.epochs


@dataclass(frozen=True, kw_only=True)
class Solve(Described):
    """Find the noise for a KL target, given the parent: `trustRegionSearch` of algorithm 1."""

    id: str
    draws: tuple[ChildSpec, ...]
    """the recipes over whose children KL is averaged; their sigma is what is looked for"""
    kl_target: float
    """nats"""
    samples: int
    """validation samples it is measured on, see `data.some`"""
    per_layer: bool = False

    @property
    def epochs(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Cell(Described):
    """Make and measure one method of a benchmark, with one seed: a run of its own."""

    id: str
    row: str
    column: str
    seed: int
    budget: int
    """epochs that it may take"""
    method: Mapping[str, Any]
    """name and options, under `method`; or of our own methods all settings of a run, under `run`"""
    training: Training
    """of the column, for the whole budget"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """settings of the data set"""
    final: bool = True
    """test data are looked at; else all is measured on validation data, to choose settings by"""

    @property
    def epochs(self) -> int:
        return self.budget


@dataclass(frozen=True, kw_only=True)
class Shifted(Described):
    """Measure the ensemble of a finished cell on shifted data."""

    id: str
    cell: str
    """id of the cell"""
    root: str | None = None
    """folder of published corrupted images; None: they are made here"""
    samples: int | None = None
    """test images that are corrupted; None: all"""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    ood: str | None = None
    """another data set, to be told from the first"""

    @property
    def epochs(self) -> int:
        return 0


RunJob = Fit | ChildSpec | Solve


class Job(Protocol):
    """What a worker is given: one of the above, or of `policy_jobs.py`."""

    @property
    def id(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every worker of a run knows."""

    folder: str
    model: str
    model_options: Mapping[str, Any] = field(default_factory=dict)
    fitness: str = "nll"
    head: str = "classes"
    """what outputs are: `regression.Head`"""
    threads: int = 1
    """torch threads of a job: part of the numbers, since sums are split over threads"""
    channels_last: bool = True
    weights: str | None = None
    """file in the run folder with the parent's initial weights; None: drawn from its seed"""
    import_from: str = ""
    """folder where the user's own modules lie (the driver's working folder)"""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of one job is done."""

    id: str
    epoch: int
    """epochs done, 1-based"""
    epochs: int
    loss: float
    """mean training loss of the epoch, nats"""
    lr: float
    """learning rate of the last step"""
    images: int
    """training images seen in the epoch"""
    seconds: float
    """wall time of the epoch"""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """what else there is to say of it, by name"""


@dataclass(frozen=True)
class Note:
    """Something happened to a job that a person should know; the job goes on."""

    id: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A file in the run folder and the SHA-256 of its bytes."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What comes back from a finished job: numbers and the name of a file, never weights."""

    id: str
    validation: dict[str, float] = field(default_factory=dict)
    """accuracy, nll and brier on validation data; of regression rmse, mae and, of a Gaussian head,
    nll"""
    weights: Stored | None = None
    """None for a child that its recipe alone makes again (noisy)"""
    outputs: Stored | None = None
    """logits on validation and test data, `(N, C)` each"""
    epochs: int = 0
    images: int = 0
    """training images seen, counted in the loop, over all attempts that count"""
    started: float = 0.0
    """seconds since the epoch (Unix time)"""
    seconds: float = 0.0
    """time that the last attempt took"""
    device_seconds: float = 0.0
    """time on a device, with what earlier attempts did up to their last checkpoint"""
    timings: dict[str, float] = field(default_factory=dict)
    """seconds of the last attempt: `spawn` until the first training step, `train`, `evaluate`"""
    worker: str = ""
    """who did it: host, process, device"""
    node: str = ""
    """machine it was done on: Ray's address and id of the node, or the host's name"""
    attempts: int = 1
    """actors that the job was given to"""
    kept: dict[str, float] = field(default_factory=dict)
    """weight -> fraction of it that is left; weights that are whole are left out"""
    acting: dict[str, float] = field(default_factory=dict)
    """weight -> fraction of it that acted in tuning, the mean over steps; empty: as in `kept`"""
    notes: tuple[str, ...] = ()
    """what a user should know of this network: one line each"""
    troubles: tuple[str, ...] = ()
    """what went wrong on the way and was mended: the network is the same without it"""
    error: str | None = None
    """why there is no network: one line"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that went wrong and was handled."""

    id: str
    """the job that it struck; `` for an actor or node without one"""
    what: str
    attempt: int = 0
    """of the job; 0 if it struck none"""
    node: str = ""
    time: float = 0.0
    """seconds since the epoch (Unix time)"""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where the work is done, as a pool sees it now."""

    nodes: int
    """machines that are alive"""
    actors: int
    """workers that are ready"""
    starting: int
    """workers that are asked for or starting"""
    running: int
    """jobs being done"""
    retried: int
    """times that a job was given to another worker"""


@dataclass(frozen=True, kw_only=True)
class ChildResult(Result):
    """The result of one child."""

    fitness: float | None = None
    """larger is better; None if the child failed"""


@dataclass(frozen=True, kw_only=True)
class SolveResult(Result):
    """The noise that meets a KL target, and how well."""

    sigma: float = 0.0
    sigmas: tuple[float, ...] = ()
    """of each layer; empty: `sigma` for all"""
    divergence: dict[str, float] = field(default_factory=dict)
    """kl, kl_std, mse, mse_std over the draws, on the samples of the job"""
    passes: int = 0
    """times that a network answered all samples"""
