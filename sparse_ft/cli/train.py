"""`sparse-ft train`: train as a recipe says, from a dense model or random weights."""

import argparse

from sparse_ft.cli import finetune

EXAMPLES = """  sparse-ft train --model timm/resnet18 --dataset photos/ --recipe recipe.yaml --output-dir out/photos
  sparse-ft train --model timm/resnet50 --pretrained --dataset photos/ --recipe gmp.md --recipe-args epochs=30 ...
  sparse-ft train ... --output-dir out/photos --resume           # after Ctrl-C: the same command with --resume"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = finetune.make_parser(prog)
    parser.usage = f"{prog} --model MODEL --dataset DATASET --recipe RECIPE --output-dir DIR [options]"
    parser.description = (
        "Train as a recipe says: prune a dense model gradually, or train a sparse one from random weights. Epochs\n"
        "and learning rates are the recipe's unless options give them. Every option of transformers'\n"
        "TrainingArguments is accepted."
    )
    parser.epilog = f"examples:\n{EXAMPLES}"
    recipe = next(action for action in parser._actions if action.dest == "recipe")
    recipe.required = True
    return parser


run = finetune.run
