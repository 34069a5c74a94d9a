"""`sparse-ft push`: a finished folder to the Hub."""

import argparse

from sparse_ft.cli import options

EXAMPLES = """  sparse-ft push out/digits user/resnet20-digits-sparse
  sparse-ft push out/digits user/resnet20-digits-sparse --private --revision experiments
  sparse-ft push out/digits team/shared-model --create-pr
  sparse-ft push out/digits user/small --compact-only --values bf16"""

VALUES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog,
        "Upload a folder that finetune or prune has written, in one commit. Checkpoints and pickles stay behind.\n"
        "Needs a Hub token: log in with `hf auth login`, or set HF_TOKEN.",
        EXAMPLES,
    )
    parser.add_argument("folder", metavar="DIR", help="the finished folder")
    parser.add_argument("repo_id", metavar="REPO_ID", help="USER/NAME on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to; made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument(
        "--compact-only", action="store_true", help="leave out the dense weights: only sparse_ft opens the rest"
    )
    parser.add_argument("--values", choices=VALUES, help="round the values of the compact form")
    parser.add_argument("--message", default="Upload sparse model", help="first line of the commit")
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import torch

    import sparse_ft

    with options.figures_only(args.json) as out:
        url = sparse_ft.push_to_hub(
            args.folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.message,
            compact_only=args.compact_only,
            values_dtype=getattr(torch, VALUES[args.values]) if args.values else None,
        )
        options.print_result(out, {"url": url} if args.json else url, args.json)
