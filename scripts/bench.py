"""Measures what docs/benchmarks.md states, each figure beside its opponents: torch dense in fp32 and bf16, torch CSR,
onnxruntime, sparseprop, sparselab. Variants take turns in one process; figures are medians.

    python scripts/bench.py --list
    python scripts/bench.py --only 'train/resnet18-*' roofs --markdown out/bench.md
    python scripts/bench.py --page docs/benchmarks.md            # everything: hours on two cores
    python scripts/bench.py --reuse --page docs/benchmarks.md    # what an interrupted run has not measured yet
"""

import argparse
import fnmatch
import json
import os
import sys
import time
from pathlib import Path

import torch
from benchmarks import channels, depthwise, inference, kernels, memory, page, plain, swat, training
from benchmarks.case import Case, Settings
from benchmarks.machine import machine

from sparse_ft.atomic import replacing
from sparse_ft.memory import keep_freed_memory


def all_cases() -> dict[str, Case]:
    modules = (kernels, depthwise, training, inference, memory, plain, swat, channels)
    return {case.name: case for module in modules for case in module.cases()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases by name or shell pattern; all if not given")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and leave")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), help="results, written after each case")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="keep what --json has from earlier, of the same code; without --only, measure only what it lacks",
    )
    parser.add_argument("--markdown", type=Path, help="write the tables of all results")
    parser.add_argument("--page", type=Path, help="fill the tables of all cases into this page")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cases = all_cases()
    if args.list:
        print("\n".join(cases))
        return
    for pattern in args.only or []:
        if not fnmatch.filter(cases, pattern):
            parser.error(f"no case matches {pattern!r}; the cases are {', '.join(cases)}")
    torch.set_num_threads(args.threads)
    results: dict = {"machine": machine(), "cases": {}}
    if args.reuse and args.json.exists():
        results["cases"] = earlier(args.json, results["machine"], parser)
    chosen = [name for name in cases if any(fnmatch.fnmatch(name, pattern) for pattern in args.only or ["*"])]
    if args.reuse and not args.only:
        chosen = [name for name in chosen if name not in results["cases"]]
    missing = [name for name in cases if name not in chosen and name not in results["cases"]]
    if args.page and missing:
        parser.error(
            f"a page needs every case, {', '.join(missing)} would be missing: use --reuse or leave out --only"
        )
    print(keep_freed_memory(), file=sys.stderr)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(chosen, 1):
        start, load = time.perf_counter(), os.getloadavg()[0]
        figures = cases[name].run(Settings(args.threads, args.rounds))
        seconds = time.perf_counter() - start
        print(f"{number}/{len(chosen)} {name}: {seconds:.0f} s (load before: {load:.1f})", file=sys.stderr, flush=True)
        # In the order of the list, whatever was measured when.
        done = {"figures": figures, "seconds": round(seconds), "load_before": round(load, 1)}
        known = {**results["cases"], name: done}
        results["cases"] = {other: known[other] for other in cases if other in known}
        write(args.json, json.dumps(results, indent=1))
    texts = page.sections(results)
    text = "\n\n".join(texts.values())
    print(text)
    if args.markdown:
        write(args.markdown, text + "\n")
    if args.page:
        write(args.page, page.fill(args.page, texts))


def earlier(path: Path, here: dict[str, str], parser: argparse.ArgumentParser) -> dict:
    results = json.loads(path.read_text())
    other = [f"{key} {results['machine'].get(key)!r}" for key in here if results["machine"].get(key) != here[key]]
    if other:
        parser.error(f"{path} was measured elsewhere ({', '.join(other)}): leave out --reuse, or give another --json")
    return results["cases"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
