"""Whether others train beside this process, and what the first of them says."""

from typing import Any

import torch


def is_parallel() -> bool:
    """Whether this is one of several processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def of_first_process(value: Any) -> Any:
    """What the first process has, in all of them."""
    if not is_parallel():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
