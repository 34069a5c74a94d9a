#!/usr/bin/env python
"""Bytes of a data-parallel training step, in two processes (gloo): what is given to all-reduces, and what the network
interface counts.

    python scripts/benchmarks/traffic.py [--model resnet18] [--sparsities 0 0.8 0.9 0.95]

The figure of the interface (Linux, /proc/net/dev, loopback) holds everything that both processes send in a step, the
synchronised buffers of norms and protocol overhead included; other traffic on the machine disturbs it.
"""

import argparse
import os
import tempfile
from pathlib import Path

import timm
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_ft import convert, freeze_masks, prune
from sparse_ft.masks import mask_state
from sparse_ft.parallel import Replicas, ignore_patterns
from sparse_ft.tables import format_table

STEPS = 3


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def worker(rank: int, address: str, results: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    rows = []
    for sparsity in options.sparsities:
        for form in ("dense",) if sparsity == 0 else ("masked dense", "native"):
            rows.append([f"{sparsity:.0%}", form, *measure(options.model, sparsity, form == "native")])
    if rank == 0:
        torch.save(rows, results)
    torch.distributed.destroy_process_group()


def measure(name: str, sparsity: float, native: bool) -> list[str]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    if sparsity:
        prune(model, sparsity)
    masks = mask_state(model)
    if native:
        convert(model, policy="always")
    held = freeze_masks(model, masks)
    ignore_patterns(model)
    parallel = DistributedDataParallel(model)
    replicas = Replicas(parallel, lambda: masks)
    for step in range(STEPS + 1):
        if step == 1:  # buckets are arranged in the first one
            torch.distributed.barrier()
            sent, interface = replicas.sent, loopback_bytes()
        loss = nn.functional.cross_entropy(parallel(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1]))
        loss.backward()
        parallel.zero_grad()
    torch.distributed.barrier()
    sent, interface = (replicas.sent - sent) // STEPS, (loopback_bytes() - interface) // STEPS
    held.remove()
    mib = 2**20
    return [f"{sent / mib:.2f}", f"{sent / whole:.1%}", f"{interface / mib:.1f}"]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="resnet18", help="of timm (default: %(default)s)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.8, 0.9, 0.95])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = os.path.join(folder, "results.pt")
        torch.multiprocessing.spawn(worker, (os.path.join(folder, "address"), results, options), nprocs=2)
        rows = torch.load(results)
    headers = ["sparsity", "layers", "gradients, MiB", "of all weights", "interface, both, MiB"]
    print(format_table(headers, rows))


if __name__ == "__main__":
    main()
