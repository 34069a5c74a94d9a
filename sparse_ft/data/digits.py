"""The bundled `digits` dataset: 1,797 handwritten digits of 8 x 8 grey pixels, no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), the copy that scikit-learn
carries.
"""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from .errors import DataError
from .splits import stratified_holdout

EVAL_FRACTION = 0.2
SPLIT_SEED = 0  # the split belongs to the dataset: it is the same whatever seed a run has


def load_digits() -> datasets.DatasetDict:
    """Returns the splits `train` (80 %) and `test` (20 %, stratified), with columns `image` and `label`.

    Raises:
        DataError: scikit-learn is not installed.
    """
    table = np.loadtxt(_source_file(), delimiter=",")  # 64 pixels counted 0..16, then the digit
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = table[:, -1].astype(int).tolist()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
    full = datasets.Dataset.from_dict(rows, features=features)
    train, test = stratified_holdout(labels, EVAL_FRACTION, SPLIT_SEED)
    return datasets.DatasetDict(train=full.select(train), test=full.select(test))


def _source_file() -> Path:
    # Found, not imported: scikit-learn brings an OpenMP runtime of its own, and two in one process share cores badly.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("the dataset 'digits' comes with scikit-learn: pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
