"""`sparse-ft export`: a model for other runtimes."""

import argparse
import sys
from typing import TYPE_CHECKING

from sparse_ft.cli import options

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMATS = {
    "onnx": "ONNX, compared with the model in onnxruntime",
    "torch": "a torch.export program, .pt2",
    "dense": "a folder with dense safetensors and config.json, for stock transformers or timm",
}

EXAMPLES = """  sparse-ft export resnet20-cifar10 --format onnx --output resnet20.onnx --dataset digits
  sparse-ft export out/bert-80 --format torch --output bert.pt2 --seq-len 64
  sparse-ft export user/sparse-llama --format dense --output out/llama"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:<6} {text}" for name, text in FORMATS.items())
    parser = options.make_parser(
        prog, f"Write a model, its zeros kept, in a format that other runtimes read.\n\nformats:\n{formats}", EXAMPLES
    )
    options.add_model_options(parser, positional=True)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write")
    parser.add_argument("--output", required=True, metavar="PATH", help="file to write; a folder for dense")
    parser.add_argument("--dataset", help="compare on examples of this dataset (see finetune) instead of random ones")
    parser.add_argument("--batch-size", type=options.positive, default=8, help="examples to compare on, 2 or more")
    parser.add_argument("--image-size", type=options.positive, help="side length in pixels instead of the model's")
    parser.add_argument("--seq-len", type=options.positive, help="tokens in a text, which the export then expects")
    parser.add_argument(
        "--remove-channels",
        action="store_true",
        help="first take out dead channels, which recipes for whole channels leave: a smaller dense network (dense "
        "folders have zeros in their place)",
    )
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sparse_ft
    from sparse_ft.cli.models import load_dense, processor_beside
    from sparse_ft.hub.export import export_onnx, export_program

    with options.figures_only(args.json) as out:
        model = load_dense(args)
        if args.remove_channels:
            print(sparse_ft.remove_channels(model, _batch(args, model)), file=sys.stderr)
        if args.format == "dense":
            sparse_ft.save_pretrained(model, args.output, processor=processor_beside(args))
            report = sparse_ft.sparsity(model)
            options.print_result(out, report, args.json)
            if not args.json:
                print(f"saved to {args.output}", file=out)
            return
        write = export_onnx if args.format == "onnx" else export_program
        options.print_result(out, write(model, args.output, _batch(args, model)), args.json)


def _batch(args: argparse.Namespace, model: "nn.Module") -> "dict[str, Tensor] | Tensor":
    """Examples of the dataset, or random ones."""
    from sparse_ft.cli.models import example_batch, processor_beside
    from sparse_ft.data import load_data, prepare
    from sparse_ft.hub.timm_models import is_timm_model

    if args.dataset is None:
        return example_batch(model, args.batch_size, image_size=args.image_size, seq_len=args.seq_len)
    data = load_data(args.dataset, max_train_samples=1, max_eval_samples=args.batch_size)
    prepared = prepare(
        data, model, processor_beside(args), image_size=args.image_size, max_length=args.seq_len, augment="none"
    )
    batch = prepared.collator([prepared.eval[index] for index in range(len(prepared.eval))])
    return batch["pixel_values"] if is_timm_model(model) else dict(batch)
