"""`sparse-ft bench`: dense against sparse, per layer and end to end."""

import argparse

from sparse_ft.cli import options
from sparse_ft.cli.errors import UsageError

EXAMPLES = """  sparse-ft bench out/resnet18-90
  sparse-ft bench timm/resnet18 --sparsity 0.95 --batch-size 32 --image-size 224 --threads 2 --plot resnet18.png
  sparse-ft bench timm/vit_small_patch16_224 --sparsity 0.9 --batch-size 16 --optimizer adamw
  sparse-ft bench bert.json --sparsity 0.97 --batch-size 16 --seq-len 128 --optimizer adamw --json
    # with bert.json: {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Time training (forward, backward, optimizer) dense against sparse, taking turns in one process.\n"
        "Opponents are the dense model in torch's contiguous and channels-last layouts, in fp32 and under autocast\n"
        "to bfloat16. Peak memory is that of a process of its own for each.",
        EXAMPLES,
    )
    options.add_model_options(parser, positional=True)
    parser.add_argument("--sparsity", type=options.fraction, help="prune the model to this share of zeros first")
    parser.add_argument("--batch-size", type=options.positive, default=32, help="examples in a step")
    parser.add_argument("--image-size", type=options.positive, help="side length in pixels instead of the model's")
    parser.add_argument("--seq-len", type=options.positive, help="tokens in a text, 128 if not given")
    parser.add_argument(
        "--steps", type=options.positive, default=5, help="turns of each form, of several short steps each"
    )
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="optimizer of the step")
    parser.add_argument(
        "--policy", choices=("auto", "always"), default="auto", help="sparse layers: those measured faster, or all"
    )
    parser.add_argument("--min-sparsity", type=options.fraction, default=0.5, help="layers below it stay dense")
    parser.add_argument("--threads", type=options.positive, help="threads, as torch.set_num_threads")
    parser.add_argument("--no-bf16", action="store_true", help="leave out the opponents in bfloat16")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument(
        "--no-keep-memory", action="store_true", help="let freed memory go back to the system between steps"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw steps, memory and layers (png, svg or pdf)")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sys

    import torch

    import sparse_ft
    from sparse_ft.bench import benchmark
    from sparse_ft.cli.models import example_batch, load_or_create
    from sparse_ft.footprint import can_measure
    from sparse_ft.memory import keep_freed_memory, return_freed_memory
    from sparse_ft.report.speed import plot_benchmark

    with options.figures_only(args.json) as out:
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.no_keep_memory:
            return_freed_memory()
        else:
            print(keep_freed_memory(), file=sys.stderr)
        model = load_or_create(args)
        if args.sparsity is not None:
            sparse_ft.prune(model, args.sparsity)
        batch = example_batch(model, args.batch_size, image_size=args.image_size, seq_len=args.seq_len)
        conversion = sparse_ft.convert(model, batch, policy=args.policy, min_sparsity=args.min_sparsity)
        if not conversion.converted and not any(layer.sparse_ms for layer in conversion.layers):
            reasons = sorted({layer.reason for layer in conversion.layers})
            raise UsageError(f"no layer can run sparse ({'; '.join(reasons)}): prune the model with --sparsity")
        memory = not args.no_memory and can_measure()
        if memory != (not args.no_memory):
            print("memory is not measured: this system has no /proc/self/clear_refs", file=sys.stderr)
        result = benchmark(
            model,
            batch,
            conversion,
            title=title(args, sparse_ft.sparsity(model).overall_pruned),
            steps=args.steps,
            optimizer=args.optimizer,
            bf16=not args.no_bf16,
            memory=memory,
            keep_memory=not args.no_keep_memory,
        )
        if args.plot:
            plot_benchmark(result, args.plot)
        options.print_result(out, result, args.json)


def title(args: argparse.Namespace, sparsity: float) -> str:
    """Model and setting in one line."""
    import torch

    size = f", {args.image_size} pixels" if args.image_size else f", {args.seq_len} tokens" if args.seq_len else ""
    threads = torch.get_num_threads()
    return (
        f"{args.model}: pruned layers {sparsity:.1%} zeros, batch {args.batch_size}{size}, {args.optimizer}, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
