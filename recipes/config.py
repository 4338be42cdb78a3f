"""The complete, typed configuration of a training run.

A recipe is a function that returns one of these. Nothing about a run is decided anywhere else, so
the configuration written beside a result says all there is to say about how it was made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from qsnn_ext.errors import ConfigError

Bits = Literal["32w-32u", "1w-8u", "1w-4u", "1w-2u"]
Dataset = Literal[
    "cifar10",
    "cifar100",
    "tinyimagenet",
    "fashionmnist",
    "dvsgesture",
    "dvscifar10",
    "nmnist",
    "digits",
    "digits-events",
]


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know; each recipe fills it with its own defaults."""

    # -- data
    recipe: str = "cifar10_resnet19"
    """Name of the recipe, kept for the record."""
    data: Dataset = "cifar10"
    """Data set to train and test on; digits and digits-events need no download and bring narrower
    networks and shorter runs with them."""
    data_dir: Path = Path("data")
    """Folder the data sets lie in; CIFAR is downloaded into it when missing."""
    size: int | None = None
    """Side of the square input in pixels; none keeps the data set's own choice for this recipe."""
    augment: bool = True
    """Augment the training set as the recipe's protocol says."""
    strong_augment: bool = True
    """CIFAR: also AutoAugment and Cutout, as the paper does; without them random crops and flips
    alone, which suit short runs."""
    holdout: int = 0
    """Training images kept aside, equally many of each class and the same ones whatever --seed;
    every epoch is judged by them, and the test set waits for the last."""
    split: Literal["tebn", "last", "random"] = "tebn"
    """How DVS-CIFAR10 is divided into training and test set; other data sets have their own
    split."""
    batch: int = 256
    """Samples per optimizer step and process, before gradient accumulation."""
    workers: int | None = None
    """Data loading processes; the result does not depend on their number. None: no process where
    whole batches are made from arrays and trained on the CPU, else four."""
    limit_batches: int | None = None
    """Use only this many training and test batches per epoch, to try a set-up out."""

    # -- network
    network: Literal["resnet19", "vgg16", "vggsnn"] = "resnet19"
    """Network of the paper to train."""
    width: float = 1.0
    """Multiplier of every hidden channel count."""
    steps: int = 2
    """Time steps T: repetitions of an image, or frames of a recording."""
    bits: Bits = "1w-2u"
    """Bits of hidden weights (w) and membrane potentials (u); 32w-32u is full precision."""
    preset: Literal["paper", "official"] = "paper"
    """The method as the paper's equations or as its authors' code has it."""
    host: Literal["spikingjelly", "snntorch"] = "spikingjelly"
    """Library whose neurons the network is built from."""
    order: Literal["fire_first", "quantize_first"] | None = None
    """Order of a time step: fire on the unquantized charge (Eq. 12) or after quantizing it
    (Algorithm 1); none takes the preset's."""
    membrane_scale: Literal["max", "absmax"] | None = None
    """What the membrane scale alpha_u is the maximum of: u or |u|; none takes the preset's."""
    membrane_mode: Literal["dynamic", "frozen", "learned"] = "dynamic"
    """Take alpha_u anew at each step, use running statistics fixed at evaluation, or learn it."""

    # -- weight-spike dual regulation
    wsdr: bool = True
    """Weight-spike dual regulation: standardised weights and the firing-rate loss."""
    weight_regulation: bool | None = None
    """Only the weight half of it (standardised weights); none follows --wsdr."""
    spike_regulation: bool | None = None
    """Only the spike half of it (firing-rate loss); none follows --wsdr."""
    strength: float = 1e-3
    """Weight lambda of the firing-rate loss."""

    # -- improvements on the paper's method
    sign_gradient: Literal["clipped", "identity", "annealed"] | None = None
    """Pseudo-gradient of the binary weights' sign; none takes the preset's. annealed sharpens it
    over the epochs."""
    latent_lr: float = 1.0
    """Factor of the learning rate for the latent weights of binary layers."""
    latent_weight_decay: float | None = None
    """Weight decay of the latent weights of binary layers; none takes --weight-decay."""
    start_from: Path | None = None
    """Folder of a run, such as one in full precision, whose last weights are the first of this
    one."""
    teacher: Path | None = None
    """Folder of a run, such as one in full precision, whose answers are learnt beside the
    labels."""
    distillation: float = 0.5
    """Share of the teacher's answers in the loss; the labels have the rest."""
    temperature: float = 4.0
    """Temperature at which answers of teacher and network are compared."""
    loss: Literal["per_step", "mean_logits"] = "per_step"
    """Cross entropy of every time step's logits (Eq. 18, TET), or of their mean over time."""
    tet: float = 0.0
    """Share of TET's second term, which draws the logits of every time step towards 1."""

    # -- optimization
    epochs: int = 300
    """Passes over the training set."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Stochastic gradient descent with momentum, or Adam."""
    lr: float = 0.1
    """Highest learning rate, from which a cosine falls to zero step by step."""
    momentum: float = 0.9
    """Momentum of stochastic gradient descent."""
    weight_decay: float = 1e-4
    """Weight decay, not applied to batch norm, biases and neuron parameters."""
    warmup: float = 0.0
    """Epochs over which the learning rate first rises linearly from zero."""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    clip: float | None = None
    """Largest gradient norm; larger ones are scaled down to it. None: no limit."""

    # -- machine
    seed: int = 0
    """Seed of initialisation, data order and augmentation."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """Number format of the arithmetic; the mixed ones keep float32 weights. auto takes bf16-mixed
    where the device multiplies bfloat16 natively, else 32-true."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """How activations lie in memory; the result is the same to rounding. auto takes channels_last,
    the faster one for convolutions on CPUs and GPUs."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    devices: int | None = None
    """Processes per node, one device each (DistributedDataParallel when more than one in all);
    none takes every GPU, or one CPU process."""
    nodes: int = 1
    """Machines taking part, each started by torchrun or the cluster's own launcher."""
    sync_batchnorm: bool = True
    """With several processes, take batch statistics over all of them."""
    kernels: Literal["auto", "native", "triton", "compiled", "function", "eager"] = "auto"
    """How the neurons' fused kernels run; auto takes the native ones on a CPU, Triton's on a
    GPU, and compiled ones where there are none and that is likely to pay."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record a training step as one CUDA graph, which spares launching its kernels one by one. auto
    does on a single GPU."""

    # -- run
    out: Path | None = None
    """Folder of the run; none makes runs/RECIPE-DATA-BITS-VARIANT-seedN."""
    resume: bool = False
    """Go on from the newest sound checkpoint in the run's folder; start anew where there is
    none."""
    stop_after: int | None = None
    """Stop once this many epochs are done, the schedule staying as it is; continue with
    --resume."""
    progress: bool = True
    """Show a progress bar when the terminal can; per-epoch lines are printed in any case."""
    as_published: bool = False
    """Use the paper's published setting where the recipe's default departs from it."""

    def __post_init__(self) -> None:
        positive = (
            *("batch", "width", "steps", "epochs", "lr", "accumulate", "nodes"),
            *("latent_lr", "temperature"),
        )
        optional = ("size", "limit_batches", "devices", "stop_after", "clip")
        for name in (*positive, *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not value > 0 or value != value or value == float("inf"):
                raise ConfigError(f"{flag(name)} must be greater than zero, got {value}.")
        zero_or_more = ("strength", "momentum", "weight_decay", "warmup", "workers", "seed")
        for name in (*zero_or_more, "holdout", "latent_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{flag(name)} must not be negative, got {value}.")
        for name in ("distillation", "tet"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{flag(name)} is a share, 0 to 1; got {getattr(self, name)}.")
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"--warmup {self.warmup} leaves nothing of --epochs {self.epochs}; make it shorter."
            )

    @property
    def quantized(self) -> bool:
        """Whether weights or membrane potentials have fewer than 32 bits."""
        return self.bits != "32w-32u"

    @property
    def standardized(self) -> bool:
        """Whether latent weights are standardised before their sign is taken (Eq. 16)."""
        chosen = self.wsdr if self.weight_regulation is None else self.weight_regulation
        return self.quantized and chosen

    @property
    def regularized(self) -> bool:
        """Whether the firing-rate loss (Eq. 17) is part of the loss."""
        chosen = self.wsdr if self.spike_regulation is None else self.spike_regulation
        # Full precision is the paper's baseline: trained without WS-DR unless asked by name.
        return chosen and (self.quantized or self.spike_regulation is not None)

    @property
    def variant(self) -> str:
        """Short name of what is regulated: ``wsdr``, ``weight``, ``spike`` or ``plain``."""
        names = {(1, 1): "wsdr", (1, 0): "weight", (0, 1): "spike", (0, 0): "plain"}
        return names[int(self.standardized), int(self.regularized)]

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints, logs and results go."""
        if self.out is not None:
            return self.out
        name = f"{self.recipe}-{self.data}-{self.bits}-{self.variant}-seed{self.seed}"
        return Path("runs") / name

    def but(self, **changes: Any) -> Config:
        """The same configuration with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as written to JSON."""
        plain = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()}


# What may differ between a run and its continuation without making it another experiment.
RESUMABLE = frozenset(
    {
        *("out", "resume", "stop_after", "progress", "workers", "data_dir", "accelerator"),
        *("compile", "cuda_graph"),
    }
)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of two :meth:`Config.to_dict` that make them different experiments."""
    names = [f.name for f in fields(Config) if f.name not in RESUMABLE]
    # What is left to the machine is whatever the other run was given.
    names = [n for n in names if ours.get(n) != "auto"]
    # A run from before an option existed ran as the option's default has it.
    defaults = Config().to_dict()
    return {
        n: (theirs.get(n), ours.get(n))
        for n in names
        if theirs.get(n, defaults[n]) not in (ours.get(n), "auto")
    }


def flag(name: str) -> str:
    """Command-line spelling of a field: ``data_dir`` is ``--data-dir``."""
    return "--" + name.replace("_", "-")
