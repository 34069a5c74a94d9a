"""Arguments of `SparseTrainer`."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` and what sparse training adds.

    Without an accelerator `use_cpu` is set, so that `bf16=True` and the other CPU options work as they stand.
    """

    sparse_policy: Literal["auto", "always", "none"] = field(
        default="auto",
        metadata={
            "help": "Which pruned layers run on the native sparse kernels: those measured faster than dense on this "
            "machine (auto), all that can (always), none: masks are kept, nothing gets faster (none)."
        },
    )
    min_sparsity: float = field(
        default=0.5,
        metadata={"help": "Layers with a smaller share of zeros stay dense; their zeros are kept all the same."},
    )
    sparse_ignore: list[str] | None = field(
        default=None,
        metadata={"help": "Layers to leave dense: names, or re:PATTERN. Their zeros are kept all the same."},
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={
            "help": "Let glibc keep freed memory for the whole process: no page faults for every activation of every "
            "step, but the memory of the largest step is held until the process ends."
        },
    )

    def __post_init__(self) -> None:
        if self.sparse_policy not in ("auto", "always", "none"):
            raise ValueError(f"sparse_policy must be auto, always or none, not {self.sparse_policy!r}")
        if not 0.0 <= self.min_sparsity < 1.0:
            raise ValueError(f"min_sparsity must be in [0, 1), not {self.min_sparsity}")
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
