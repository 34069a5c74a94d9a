"""`sparse-ft recipe`: check, show and convert recipes."""

import argparse
import sys
from typing import TYPE_CHECKING, TextIO

from sparse_ft.cli import options
from sparse_ft.cli.errors import UsageError

if TYPE_CHECKING:
    from sparse_ft.recipes import Recipe

ACTIONS = {
    "validate": "read and check a recipe; with --model also the names of weights",
    "show": "print its schedule as tables; --plot draws it",
    "convert": "write it in the flat dialect, variables and expressions replaced by their values",
    "modifiers": "list all modifiers (without FILE); --markdown describes every field",
}

EXAMPLES = """  sparse-ft recipe validate recipe.yaml --model timm/resnet50
  sparse-ft recipe show recipe.md --recipe-args num_epochs=30 --plot schedule.png
  sparse-ft recipe convert user/sparse-bert --output recipe.yaml
  sparse-ft recipe modifiers"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    actions = "\n".join(f"  {name:<10} {text}" for name, text in ACTIONS.items())
    parser = options.make_parser(
        prog, f"Check, show and convert recipes: own ones, and those of SparseML.\n\nactions:\n{actions}", EXAMPLES
    )
    parser.usage = f"{prog} ACTION [FILE] [options]"
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help="validate, show, convert or modifiers")
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="a .yaml, .yml, .md or .json file, a folder with a recipe.yaml, or a Hub id",
    )
    parser.add_argument("--recipe-args", metavar="ARGS", help="values of its variables: name=value,name=value or JSON")
    parser.add_argument("--compat", choices=["sparseml"], help="the schedule of sparseml 1.8.0, with its faults")
    parser.add_argument("--ignore-unknown", action="store_true", help="warn of what is unknown, and pass it over")
    parser.add_argument(
        "--model", metavar="MODEL", help=f"validate: check that the weights are there; {options.MODEL_HELP}"
    )
    parser.add_argument(
        "--steps-per-epoch", type=options.positive, default=100, help="show: optimizer steps of an epoch"
    )
    parser.add_argument("--plot", metavar="FILE", help="show: draw the schedule (png, svg or pdf)")
    parser.add_argument("--output", metavar="FILE", help="convert: write to a file and not to stdout")
    parser.add_argument("--markdown", action="store_true", help="modifiers: describe every field")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from sparse_ft.recipes import Recipe
    from sparse_ft.recipes.schedule import make_schedule

    with options.figures_only(args.json) as out:
        if args.action == "modifiers":
            _list_modifiers(args, out)
            return
        if args.file is None:
            raise UsageError(f"{args.action} needs a FILE")
        recipe = Recipe.load(args.file, args=args.recipe_args, compat=args.compat, ignore_unknown=args.ignore_unknown)
        if args.action == "validate":
            _validate(args, recipe, out)
        elif args.action == "show":
            schedule = make_schedule(recipe, args.steps_per_epoch)
            if args.plot:
                schedule.plot(args.plot)
            options.print_result(out, schedule, args.json)
        else:
            _convert(args, recipe, out)


def _validate(args: argparse.Namespace, recipe: "Recipe", out: TextIO) -> None:
    recipe.check_supported()
    weights = None
    if args.model:
        from sparse_ft.cli.models import quieten_loading
        from sparse_ft.hub import load_model

        quieten_loading()
        weights = len(recipe.check_names(load_model(args.model)))
    facts = {
        "recipe": recipe.name,
        "dialect": recipe.document.dialect,
        "modifiers": len(recipe.modifiers),
        "epochs": recipe.max_epochs,
        "weights": weights,
    }
    if args.json:
        options.print_result(out, facts, True)
        return
    found = "" if weights is None else f", {weights} weights of the model"
    print(f"{recipe.name}: fine; {len(recipe.modifiers)} modifiers, {recipe.max_epochs} epochs{found}", file=out)


def _convert(args: argparse.Namespace, recipe: "Recipe", out: TextIO) -> None:
    flat = recipe.to_flat()
    if args.output:
        flat.save(args.output)
        print(f"written to {args.output}", file=sys.stderr)
    elif args.json:
        options.print_result(out, {"recipe": flat.dump()}, True)
    else:
        print(flat.dump(), end="", file=out)


def _list_modifiers(args: argparse.Namespace, out: TextIO) -> None:
    from sparse_ft.recipes.reference import modifier_lines, modifier_reference
    from sparse_ft.tables import format_table

    if args.file is not None:
        raise UsageError(f"modifiers takes no FILE, but there is {args.file!r}")
    rows = modifier_lines()
    if args.json:
        options.print_result(
            out, {"modifiers": [dict(zip(("name", "what", "source"), row, strict=True)) for row in rows]}, True
        )
    elif args.markdown:
        print(modifier_reference(), end="", file=out)
    else:
        print(format_table(["modifier", "what it does", "source"], rows), file=out)
