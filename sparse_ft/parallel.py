"""Several processes that train one model whose layers may change their form.

Gradients are averaged by torch's DistributedDataParallel, which takes note of the parameters once, when it wraps the
model, and averages whole tensors. Here it begins anew when layers have changed their form, and a communication hook
sends of each gradient only what a mask keeps: traffic is proportional to the nonzeros, whichever form a layer has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from sparse_ft.conversion import ConversionReport, convert
from sparse_ft.nn import SparseModule
from sparse_ft.processes import is_parallel, of_first_process


class Replicas:
    """DistributedDataParallel around a model under masks.

    Args:
        parallel: the wrapped model; it must have no communication hook of its own.
        masks: gives, by weight name, the masks outside of which gradients of the present step are zero.

    Attributes:
        sent: bytes of gradients that this process has given to all-reduces.
    """

    def __init__(self, parallel: DistributedDataParallel, masks: Callable[[], Mapping[str, Tensor]]):
        self.sent = 0
        self._parallel = parallel
        self._masks = masks
        self._indices: dict[str, tuple[Tensor, Tensor]] = {}  # mask and the places that it keeps
        self.renew()

    def renew(self) -> None:
        """Goes on with the parameters that the model has now, which are the same in all processes."""
        parallel = self._parallel
        ignore_patterns(parallel.module)
        synced = parallel.broadcast_buffers
        parallel.__init__(  # type: ignore[misc]
            parallel.module,
            device_ids=parallel.device_ids,
            output_device=parallel.output_device,
            dim=parallel.dim,
            init_sync=False,
            process_group=parallel.process_group,
            bucket_cap_mb=None if parallel.bucket_bytes_cap_default else parallel.bucket_bytes_cap / 2**20,
            find_unused_parameters=parallel.find_unused_parameters,
            gradient_as_bucket_view=parallel.gradient_as_bucket_view,
            static_graph=parallel.static_graph,
        )
        parallel.broadcast_buffers = synced
        parallel.register_comm_hook(None, self._average)
        self._names = {parameter: name for name, parameter in parallel.module.named_parameters()}

    def _average(self, _: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Sums what is kept of the gradients over the processes, divided by their number."""
        group, buffer = self._parallel.process_group, bucket.buffer()
        masks = self._masks()
        flat = [gradient.view(-1) for gradient in bucket.gradients()]
        kept = [self._kept(parameter, masks) for parameter in bucket.parameters()]
        whole = all(index is None for index in kept)
        pairs = list(zip(flat, kept, strict=True))
        sent = buffer if whole else torch.cat([values if index is None else values[index] for values, index in pairs])
        sent.div_(group.size())
        self.sent += sent.numel() * sent.element_size()

        def put_back(_: Any) -> Tensor:
            if not whole:
                sizes = [values.numel() if index is None else index.numel() for values, index in pairs]
                for (values, index), average in zip(pairs, sent.split(sizes), strict=True):
                    if index is None:
                        values.copy_(average)
                    else:
                        values[index] = average
            return buffer

        return torch.distributed.all_reduce(sent, group=group, async_op=True).get_future().then(put_back)

    def _kept(self, parameter: Tensor, masks: Mapping[str, Tensor]) -> Tensor | None:
        """Flat places of a gradient that are sent; None for all of them."""
        name = self._names[parameter]
        mask = masks.get(name)
        if mask is None or mask.shape != parameter.shape:  # of a native layer, whose gradient has nothing else
            return None
        known, index = self._indices.get(name, (None, None))
        if known is not mask:
            index = mask.to(parameter.device).flatten().nonzero().squeeze(1)
            self._indices[name] = mask, index
        return index


def ignore_patterns(model: nn.Module) -> None:
    """Makes DistributedDataParallel leave index tensors alone, which it would send at every step."""
    names = [
        f"{layer}.pattern.{name}"
        for layer, module in model.named_modules()
        if isinstance(module, SparseModule)
        for name, _ in module.pattern.named_buffers()
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def convert_alike(model: nn.Module, example_inputs: Callable[[], Any], **options: Any) -> ConversionReport:
    """`sparse_ft.convert` in all processes: the first one measures, and the others take its choice.

    Each would measure for itself, and gradients of different layers cannot be averaged.

    Args:
        example_inputs: gives a batch; only called in the process that needs it.
        options: of `sparse_ft.convert`.
    """
    first = not is_parallel() or torch.distributed.get_rank() == 0
    report = convert(model, example_inputs(), **options) if first else None
    chosen = of_first_process(None if report is None else report.converted)
    if report is None:
        kept = {name: options[name] for name in ("min_sparsity", "masks") if name in options}
        report = convert(model, layers=chosen, **kept)
    return report
