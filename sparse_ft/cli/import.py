"""`sparse-ft import`: a checkpoint of another tool, saved in our layout."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ft.cli import options

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """  sparse-ft import pruned.pth --reference timm/resnet50 --output-dir out/resnet50
  sparse-ft import zoo/model.pth --reference timm/resnet18 --num-labels 10 --output-dir out/zoo
  sparse-ft import bert/pytorch_model.bin --reference bert --output-dir out/bert
  sparse-ft import neuralmagic/Llama-2-7b-pruned50 --output-dir out/llama      # a sparse-bitmask repository
  sparse-ft import old.pth --reference timm/resnet18 --rename '^linear=fc' --output-dir out/old"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Read a sparse checkpoint that another tool wrote, and save it in safetensors with a config.json.\n"
        "Files: state dicts with zeros, torch.nn.utils.prune, ASP's N:M masks, SparseML, sparseprop. Folders and\n"
        "repositories: Neural Magic's sparse-bitmask, or dense ones. Pickles are read without running their code.",
        EXAMPLES,
    )
    options.add_model_options(parser, positional=True)
    parser.add_argument("--num-labels", type=options.positive, help="classes of a new classifier")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the model is saved")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sparse_ft
    from sparse_ft.cli.models import origin, processor_beside, quieten_loading
    from sparse_ft.hub.foreign import read_recipe
    from sparse_ft.masks import sparsity

    quieten_loading()
    with options.figures_only(args.json) as out:
        model = sparse_ft.from_pretrained(
            args.model,
            num_labels=args.num_labels,
            **origin(args),
            policy="always",  # sparse layers keep masks that the zeros do not tell
            min_sparsity=0.0,
        )
        report, structures = sparsity(model), n_of_m_structures(model)
        sparse_ft.save_pretrained(
            model,
            args.output_dir,
            processor=processor_beside(args),
            recipe=read_recipe(args.model) if args.reference else None,
            extra={
                "imported_from": Path(args.model).name if args.reference else args.model,
                **({"structures": dict(structures)} if structures else {}),
            },
        )
        options.print_result(out, report, args.json)
        if not args.json:
            for structure, layers in structures.items():
                print(f"{structure} in {layers} layers", file=out)
            print(f"saved to {args.output_dir}", file=out)


def n_of_m_structures(model: "nn.Module") -> Counter[str]:
    """Number of layers by their N:M structure, for those that have one."""
    from sparse_ft.masks import mask_state
    from sparse_ft.masks.structures import n_of_m
    from sparse_ft.nn import SparseModule, is_transformers_conv1d

    found = Counter[str]()
    for name, mask in mask_state(model).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        transposed = layer.stored_transposed if isinstance(layer, SparseModule) else is_transformers_conv1d(layer)
        if structure := n_of_m(mask, transposed=transposed):
            found[structure] += 1
    return found
