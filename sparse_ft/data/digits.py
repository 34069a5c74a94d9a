"""The bundled `digits` dataset: 1,797 handwritten digits of 8 x 8 grey pixels, no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), the copy that scikit-learn
carries.
"""

import datasets
import numpy as np
from PIL import Image

from .splits import stratified_holdout

EVAL_FRACTION = 0.2
SPLIT_SEED = 0  # the split belongs to the dataset: it is the same whatever seed a run has


def load_digits() -> datasets.DatasetDict:
    """Returns the splits `train` (80 %) and `test` (20 %, stratified), with columns `image` and `label`."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the source counts 0..16
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
    full = datasets.Dataset.from_dict(rows, features=features)
    train, test = stratified_holdout(bunch.target, EVAL_FRACTION, SPLIT_SEED)
    return datasets.DatasetDict(train=full.select(train), test=full.select(test))
