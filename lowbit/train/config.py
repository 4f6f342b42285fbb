"""What a training run is: one frozen dataclass, checked before anything is computed."""

import dataclasses
import json
import math
from typing import Any, Literal

from lowbit.errors import InputError, unknown

SCHEDULES = ("constant", "cosine", "linear", "wsd", "two-stage")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")
LOSSES = ("ce", "kl", "mixed")
KL = ("forward", "reverse")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")

# What may differ between a run and its resumption. A mesh changes no more than the order of additions.
OPERATIONAL = ("log_every", "save_every", "keep", "mesh")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training settings. Lengths are steps, `batch_size` is sequences per step (all devices and microbatches)."""

    steps: int = 1000
    batch_size: int = 8
    microbatches: int = 1  # sequential parts of a step, to save memory
    seed: int = 0  # of whatever the caller draws, such as the order of the rows; the loop itself draws nothing

    loss: Literal["ce", "kl", "mixed"] = "ce"
    kl_weight: float = 0.5  # of the KL term when loss is "mixed"
    kl_direction: Literal["forward", "reverse"] = "forward"  # KL(teacher || student), or the other way round
    temperature: float = 1.0  # of teacher and student in the KL term
    hidden_weight: float = 0.0  # of the distance between the hidden states that the heads get; added to any loss

    optimizer: Literal["adamw", "adam", "sgd", "lion", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "linear", "wsd", "two-stage"] = "cosine"
    warmup: int = 0
    decay: float = 0.2  # last fraction of the steps in which "wsd" decays
    lr_second: float = 2 / 3  # peak of the second half of "two-stage" (BitNet), times lr
    lr_end: float = 0.1  # final over peak learning rate of "cosine", "linear" and "wsd"
    scale_lr: float = 0.1  # learning rate of what formats learn (scales, zero points), times lr
    lr_groups: tuple[tuple[str, float], ...] = ()  # (regex over names, factor of lr), first match wins, 0 freezes
    b1: float = 0.9  # momentum of sgd too
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices only, never of norms, biases, embeddings or scales
    decay_until: float = 1.0  # fraction of the steps after which weight_decay is exactly 0 (BitNet: 0.5)
    scale_decay: float = 0.0  # weight decay of what formats learn: PACT's L2 penalty
    clip: float = 1.0  # global gradient norm; 0: no clipping

    quant_warmup: int = 0  # steps in which the share of quantization rises from 0 to 1, in weights and inputs

    track_codes: bool = False  # report the shares of codes that change, oscillate and are frozen
    freeze_above: float = 0.0  # frequency of oscillation from which on a weight is frozen; 0: never
    freeze_momentum: float = 0.99  # of the moving averages behind that

    revise_every: int = 16  # steps between changes of codes, for recipes that have such (pv)
    revise_fraction: float = 0.01  # of the vectors, tiles or weights whose codes change at once, at most
    revise_rows: int = 128  # of text that say which, and as many others how many

    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; masters are float32
    remat: Literal["none", "full", "dots"] = "none"
    loss_chunk: int = 0  # positions whose logits exist at once; 0: all

    mesh: tuple[int, int, int] = (-1, 1, 1)  # devices along data, fsdp, tensor; one -1 takes what is left

    log_every: int = 10
    save_every: int = 0  # also evaluates, if there is a held-out text; 0: only at the end
    keep: int = 2  # latest checkpoints kept, besides the best one if there is a held-out text

    def __post_init__(self) -> None:
        """Raises `InputError` on a value that cannot be."""
        for name, allowed in _NAMES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                top = "" if high == math.inf else f" and at most {high:g}"
                raise InputError(f"{name} is {value} (allowed: at least {low:g}{top})")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr} (allowed: above 0)")
        for name in ("weight_decay", "scale_decay"):
            if self.optimizer == "adam" and getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)} with optimizer 'adam' (allowed: 0, or 'adamw')")
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature} (allowed: above 0)")
        if self.batch_size % self.microbatches:
            raise InputError(
                f"microbatches is {self.microbatches} (allowed: a divisor of batch_size {self.batch_size})"
            )
        for name in ("warmup", "quant_warmup"):
            if getattr(self, name) > self.steps:
                raise InputError(f"{name} is {getattr(self, name)} (allowed: at most steps, {self.steps})")
        if any(n == 0 or n < -1 for n in self.mesh) or list(self.mesh).count(-1) > 1:
            raise InputError(f"mesh is {self.mesh} (allowed: three device counts, at most one of them -1)")

    @property
    def taught(self) -> bool:
        """Whether the objective has a term that needs a teacher."""
        return self.loss != "ce" or self.hidden_weight > 0

    def check_revisions(self) -> None:
        """Raises `InputError` if no step is followed by a revision, for recipes that have such."""
        if self.revise_every >= self.steps:
            raise InputError(
                f"revise_every is {self.revise_every} with {self.steps} steps, so none changes (allowed: below steps)"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues, JSON-able."""
        keep = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in OPERATIONAL}
        if self.schedule == "constant":
            del keep["steps"]  # a constant schedule can be extended without changing what has been done
        return json.loads(json.dumps(keep))  # tuples become lists, as they come back from a file


_NAMES = {
    "loss": LOSSES,
    "kl_direction": KL,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "dtype": DTYPES,
    "remat": REMAT,
}
_RANGES = (
    ("steps", 1, math.inf),
    ("batch_size", 1, math.inf),
    ("microbatches", 1, math.inf),
    ("seed", 0, 2**32 - 1),
    ("kl_weight", 0, 1),
    ("hidden_weight", 0, math.inf),
    ("warmup", 0, math.inf),
    ("decay", 0, 1),
    ("lr_second", 0, math.inf),
    ("lr_end", 0, 1),
    ("scale_lr", 0, math.inf),
    ("b1", 0, 1),
    ("b2", 0, 1),
    ("eps", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("decay_until", 0, 1),
    ("scale_decay", 0, math.inf),
    ("quant_warmup", 0, math.inf),
    ("freeze_above", 0, 1),
    ("freeze_momentum", 0, 1),
    ("revise_every", 1, math.inf),
    ("revise_fraction", 0, 1),
    ("revise_rows", 1, math.inf),
    ("clip", 0, math.inf),
    ("loss_chunk", 0, math.inf),
    ("log_every", 1, math.inf),
    ("save_every", 0, math.inf),
    ("keep", 1, math.inf),
)
