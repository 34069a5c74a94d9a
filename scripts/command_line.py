"""What the command lines of these scripts have in common."""

import argparse
import os
from pathlib import Path

# Folder of the datasets and checkpoints that tests and benchmarks use.
DATA = Path(os.environ.get("SPARSE_FT_SHARED", "../shared")) / "data"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script: its first line, the options, the rest."""
    summary, _, details = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
