"""`sparse-ft inspect`: sparsity by layer, and what runs natively."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from sparse_ft.cli import options

if TYPE_CHECKING:
    from sparse_ft.conversion import ConversionReport
    from sparse_ft.hub.remote import RemoteModel
    from sparse_ft.masks import SparsityReport

EXAMPLES = """  sparse-ft inspect out/resnet18-90
  sparse-ft inspect out/resnet18-90 --measure
  sparse-ft inspect resnet20-cifar10 --html report.html --plot sparsity.png
  sparse-ft inspect user/sparse-bert --json"""

HEADERS = ["layer", "kind", "shape", "nonzeros", "weights", "sparsity", "runs", "why"]


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Show the sparsity of each layer, whether it can run on the native sparse kernels, and why not.\n"
        "Of a model on the Hub its sparsity alone, from the headers of its files: no weights are downloaded.",
        EXAMPLES,
    )
    options.add_model_options(parser, positional=True)
    parser.add_argument(
        "--min-sparsity", type=options.fraction, default=0.5, help="layers with a smaller share of zeros stay dense"
    )
    parser.add_argument(
        "--measure", action="store_true", help="time each layer, and count as native what is faster than dense here"
    )
    parser.add_argument("--html", metavar="FILE", help="write the table as a web page")
    parser.add_argument("--plot", metavar="FILE", help="draw the sparsity by layer (png, svg or pdf)")
    parser.add_argument(
        "--download",
        action="store_true",
        help="download a Hub model's weights, and show what runs natively",
    )
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import sparse_ft
    from sparse_ft.cli.models import example_batch, load_dense
    from sparse_ft.report import write_report

    with options.figures_only(args.json) as out:
        remote = None if args.download or args.measure or args.html or args.plot else _without_weights(args)
        if remote is not None:
            options.print_result(out, remote, args.json)
            return
        model = load_dense(args)
        report = sparse_ft.sparsity(model)
        if args.plot:
            report.plot(args.plot)
        conversion = sparse_ft.convert(
            model,
            example_batch(model, 16) if args.measure else None,
            policy="auto" if args.measure else "always",
            min_sparsity=args.min_sparsity,
        )
        inspection = Inspection(args.model, report, conversion)
        if args.html:
            write_report(
                args.html,
                title=f"Sparsity of {args.model}",
                summary={"model": args.model, "native layers": str(len(inspection.native))},
                sparsity=report,
                conversion=conversion,
            )
        options.print_result(out, inspection, args.json)


def _without_weights(args: argparse.Namespace) -> "RemoteModel | None":
    """What a model on the Hub says of itself; None for other models, and where it says nothing."""
    from sparse_ft.hub.remote import inspect_remote
    from sparse_ft.hub.source import hub_repository

    repository = hub_repository(args.model)
    if repository is None or args.pretrained:
        return None
    remote = inspect_remote(repository, revision=args.revision)
    if remote is None:
        print(f"{repository} has neither a compact form nor sparse_ft.json: downloading its weights", file=sys.stderr)
    return remote


class Inspection:
    """Sparsity and conversion of the same layers, side by side."""

    def __init__(self, model: str, report: "SparsityReport", conversion: "ConversionReport"):
        self.model = model
        self.report = report
        self.conversion = {layer.name: layer for layer in conversion.layers}

    @property
    def native(self) -> list[str]:
        return [name for name, layer in self.conversion.items() if layer.converted]

    def to_dict(self) -> dict[str, Any]:
        content = self.report.to_dict()
        for layer in content["layers"]:
            conversion = self.conversion.get(layer["name"])
            layer["native"] = conversion is not None and conversion.converted
            layer["reason"] = self._reason(layer["name"])
            layer["dense_ms"] = None if conversion is None else conversion.dense_ms
            layer["sparse_ms"] = None if conversion is None else conversion.sparse_ms
        return {"model": self.model, "native_layers": len(self.native), **content}

    def _reason(self, name: str) -> str:
        conversion = self.conversion.get(name)
        return "its weight is not a plain parameter" if conversion is None else conversion.reason

    def _rows(self) -> list[list[str]]:
        rows = []
        for layer in self.report.layers:
            runs = "native" if layer.name in self.native else "dense"
            why = self._reason(layer.name) if runs == "native" else layer.note or self._reason(layer.name)
            shape = "x".join(map(str, layer.shape))
            count = [f"{layer.nnz:,}", f"{layer.numel:,}", f"{layer.sparsity:.2%}"]
            rows.append([layer.name, layer.kind, shape, *count, runs, why])
        return rows

    def _total(self) -> list[str]:
        count = [f"{self.report.nnz:,}", f"{self.report.numel:,}", f"{self.report.overall:.2%}"]
        return ["total", "", "", *count, f"{len(self.native)} native", ""]

    def __str__(self) -> str:
        from sparse_ft.tables import format_table

        return format_table(HEADERS, self._rows(), footer=self._total())
