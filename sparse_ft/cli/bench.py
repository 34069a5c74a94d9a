"""`sparse-ft bench`: dense against sparse, per layer and end to end."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_ft.cli import options
from sparse_ft.cli.errors import UsageError

if TYPE_CHECKING:
    from sparse_ft.bench import StepComparison
    from sparse_ft.conversion import ConversionReport

EXAMPLES = """  sparse-ft bench out/resnet18-90
  sparse-ft bench timm/resnet18 --sparsity 0.95 --batch-size 32 --image-size 224 --threads 2
  sparse-ft bench out/bert-80 --batch-size 16 --seq-len 128 --optimizer adamw --json"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Time training (forward, backward, optimizer) dense against sparse, taking turns in one process.\n"
        "The dense opponent is the faster of torch's contiguous and channels-last layouts.",
        EXAMPLES,
    )
    options.add_model_options(parser, positional=True)
    parser.add_argument("--sparsity", type=options.fraction, help="prune the model to this share of zeros first")
    parser.add_argument("--batch-size", type=options.positive, default=32, help="examples in a step")
    parser.add_argument("--image-size", type=options.positive, help="side length in pixels instead of the model's")
    parser.add_argument("--seq-len", type=options.positive, help="tokens in a text, 128 if not given")
    parser.add_argument("--steps", type=options.positive, default=5, help="timed steps of each form")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="optimizer of the step")
    parser.add_argument(
        "--policy", choices=("auto", "always"), default="auto", help="sparse layers: those measured faster, or all"
    )
    parser.add_argument("--min-sparsity", type=options.fraction, default=0.5, help="layers below it stay dense")
    parser.add_argument("--threads", type=options.positive, help="threads, as torch.set_num_threads")
    parser.add_argument(
        "--no-keep-memory", action="store_true", help="let freed memory go back to the system between steps"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the layers' times (png, svg or pdf)")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sys

    import torch

    import sparse_ft
    from sparse_ft.cli.models import example_batch, load_dense
    from sparse_ft.memory import keep_freed_memory

    with options.figures_only(args.json) as out:
        if args.threads:
            torch.set_num_threads(args.threads)
        if not args.no_keep_memory:
            print(keep_freed_memory(), file=sys.stderr)
        model = load_dense(args)
        if args.sparsity is not None:
            sparse_ft.prune(model, args.sparsity)
        batch = example_batch(model, args.batch_size, image_size=args.image_size, seq_len=args.seq_len)
        conversion = sparse_ft.convert(model, batch, policy=args.policy, min_sparsity=args.min_sparsity)
        if not conversion.converted and not any(layer.sparse_ms for layer in conversion.layers):
            reasons = sorted({layer.reason for layer in conversion.layers})
            raise UsageError(f"no layer can run sparse ({'; '.join(reasons)}): prune the model with --sparsity")
        steps = None
        if conversion.converted:
            steps = sparse_ft.compare_steps(model, batch, steps=args.steps, optimizer=args.optimizer)
        if args.plot:
            plot(conversion, args.plot)
        options.print_result(out, Benchmark(conversion, steps), args.json)


class Benchmark:
    """Layers, and whole steps unless every layer was faster dense."""

    def __init__(self, conversion: "ConversionReport", steps: "StepComparison | None"):
        self.conversion = conversion
        self.steps = steps

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.conversion.to_dict()["layers"], "step": self.steps and self.steps.to_dict()}

    def __str__(self) -> str:
        steps = self.steps or "no layer is faster sparse on this machine: the training step is the dense one"
        return f"{self.conversion}\n\n{steps}"


def plot(conversion: "ConversionReport", path: str | Path) -> None:
    """Draws dense and sparse milliseconds (forward and backward) of each measured layer."""
    from matplotlib.figure import Figure

    layers = [layer for layer in conversion.layers if layer.dense_ms is not None and layer.sparse_ms is not None]
    if not layers:
        raise UsageError("--plot draws measured layers: it goes with --policy auto")
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.barh(
        [p - 0.2 for p in places], [layer.dense_ms or 0 for layer in layers], 0.4, label="dense", color="#9aa5b1"
    )
    axes.barh(
        [p + 0.2 for p in places], [layer.sparse_ms or 0 for layer in layers], 0.4, label="sparse", color="#3b6ea5"
    )
    axes.set_yticks(list(places), [layer.name for layer in layers], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("forward and backward, ms")
    axes.legend()
    figure.savefig(path, dpi=150)
