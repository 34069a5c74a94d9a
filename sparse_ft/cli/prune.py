"""`sparse-ft prune`: one-shot pruning."""

import argparse

from sparse_ft.cli import options
from sparse_ft.cli.errors import UsageError

EXAMPLES = """  sparse-ft prune --model timm/resnet18 --pretrained --sparsity 0.9 --output-dir out/resnet18-90
  sparse-ft prune --model google-bert/bert-base-uncased --sparsity 0.8 --scope global --output-dir out/bert-80
  sparse-ft prune --model timm/resnet50 --pretrained --structure 2:4 --output-dir out/resnet50-2of4
  sparse-ft prune --model timm/resnet50 --pretrained --recipe recipes/2of4.yaml --output-dir out/resnet50-2of4
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
        help="every layer alike (uniform, if not given), more in larger layers (erk), lowest weights of all (global)",
    )
    parser.add_argument("--structure", help="unstructured (if not given), N:M, block_AxB, filter or channel")
    parser.add_argument(
        "--ignore",
        nargs="+",
        metavar="NAME",
        help="layers to leave dense: names or re:PATTERN; 'auto', if not given, stands for those named above",
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="prune to what a recipe leads to; sparsity, scope and the like are its own"
    )
    parser.add_argument("--recipe-args", metavar="ARGS", help="values of its variables: name=value,name=value or JSON")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the model is saved")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sparse_ft
    from sparse_ft.cli.models import load_dense, processor_beside

    if args.recipe is None:
        if args.recipe_args is not None:
            raise UsageError("--recipe-args needs a --recipe")
    elif own := next((name for name in ("sparsity", "scope", "structure", "ignore") if getattr(args, name)), None):
        raise UsageError(f"--{own} is the recipe's own: leave it out beside --recipe")
    scope, structure = args.scope or "uniform", args.structure or "unstructured"
    method = {"name": "one-shot magnitude", "scope": scope, "structure": structure}
    with options.figures_only(args.json) as out:
        model = load_dense(args)
        if args.recipe is not None:
            report = sparse_ft.apply_recipe(model, args.recipe, recipe_args=args.recipe_args)
            method = {"name": "recipe in one shot", "recipe": args.recipe}
        else:
            report = sparse_ft.prune(
                model, args.sparsity, scope=scope, structure=structure, ignore=args.ignore or ["auto"]
            )
        sparse_ft.save_pretrained(
            model,
            args.output_dir,
            processor=processor_beside(args),
            extra={"method": method},
        )
        options.print_result(out, report, args.json)
        if not args.json:
            print(f"saved to {args.output_dir}", file=out)
