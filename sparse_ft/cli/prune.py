"""`sparse-ft prune`: one-shot pruning."""

import argparse

from sparse_ft.cli import options

EXAMPLES = """  sparse-ft prune --model timm/resnet18 --pretrained --sparsity 0.9 --output-dir out/resnet18-90
  sparse-ft prune --model google-bert/bert-base-uncased --sparsity 0.8 --scope global --output-dir out/bert-80
  sparse-ft prune --model timm/resnet50 --pretrained --structure 2:4 --output-dir out/resnet50-2of4
  sparse-ft prune --model timm/vit_tiny_patch16_224 --sparsity 0.5 --ignore auto 're:blocks.0' --output-dir out/vit"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Set the least important weights of a model to zero, in one shot, and save it in dense layout.\n"
        "The stem, the classifier head, depthwise layers, embeddings and tied weights stay dense.",
        EXAMPLES,
    )
    options.add_model_options(parser, positional=False)
    parser.add_argument("--sparsity", type=options.fraction, help="share of zeros, 0.95 if not given")
    parser.add_argument(
        "--scope",
        choices=("uniform", "erk", "global"),
        default="uniform",
        help="every layer alike (uniform), more in larger layers (erk), the lowest weights of all layers (global)",
    )
    parser.add_argument("--structure", default="unstructured", help="unstructured, N:M, block_AxB, filter or channel")
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="layers to leave dense: names or re:PATTERN; 'auto' stands for those named above",
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the model is saved")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sparse_ft
    from sparse_ft.cli.models import load_dense, processor_beside

    with options.figures_only(args.json) as out:
        model = load_dense(args)
        report = sparse_ft.prune(model, args.sparsity, scope=args.scope, structure=args.structure, ignore=args.ignore)
        sparse_ft.save_pretrained(
            model,
            args.output_dir,
            processor=processor_beside(args),
            extra={"method": {"name": "one-shot magnitude", "scope": args.scope, "structure": args.structure}},
        )
        options.print_result(out, report, args.json)
        if not args.json:
            print(f"saved to {args.output_dir}", file=out)
