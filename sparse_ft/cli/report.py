"""`sparse-ft report`: finished runs side by side on one page."""

import argparse

from sparse_ft.cli import options

EXAMPLES = """  sparse-ft report out/
  sparse-ft report out/resnet18-90 out/resnet18-95 --metric accuracy --output models.html"""


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Write a page that compares finished runs: accuracy over sparsity and step time, and a table that sorts.\n"
        "A run is a folder with a sparse_ft.json, as finetune, train and prune write it.",
        EXAMPLES,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, or of runs")
    parser.add_argument("--output", default="gallery.html", metavar="FILE", help="the page")
    parser.add_argument("--metric", help="metric to draw; by default the one that most runs are judged by")
    parser.add_argument("--title", default="Models", help="heading of the page")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from sparse_ft.report import find_runs, write_gallery

    with options.figures_only(args.json) as out:
        runs = find_runs(args.folders)
        write_gallery(args.output, runs, metric=args.metric, title=args.title)
        result = {"page": args.output, "runs": [run.to_dict() for run in runs]}
        options.print_result(out, result if args.json else args.output, args.json)
