"""Finding datasets, their columns, their task and their splits."""

from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_files import png, write_csv, write_images
from PIL import Image

from sparse_ft.data import DataError, load_data
from sparse_ft.data.splits import stratified_holdout


def test_digits_is_the_same_for_every_seed():
    first, second = load_data("digits", seed=1), load_data("digits", seed=2)
    assert first.task == "image-classification"
    assert first.label_names == [str(d) for d in range(10)]
    assert (len(first.train), len(first.eval)) == (1438, 359)
    assert first.eval.labels == second.eval.labels
    counts = Counter(first.eval.labels)
    assert max(counts.values()) - min(counts.values()) <= 2  # stratified
    assert not first.notes
    assert first.train.rows[0]["image"].size == (8, 8)


def test_holdout_covers_every_row_once_and_every_class():
    labels = [0] * 50 + [1] * 3 + [2] + [3] * 2
    kept, held_out = stratified_holdout(labels, 0.1, seed=0)
    assert sorted(kept + held_out) == list(range(len(labels)))
    assert Counter(labels[i] for i in held_out) == {0: 5, 1: 1, 3: 1}  # the single row of class 2 is for training
    assert stratified_holdout(labels, 0.1, seed=0) == (kept, held_out)
    assert stratified_holdout(labels, 0.1, seed=1) != (kept, held_out)


def test_folder_of_images_without_splits_holds_out_and_says_so(tmp_path):
    data = load_data(str(write_images(tmp_path / "pets", count=10)), seed=3)
    assert data.task == "image-classification"
    assert data.label_names == ["cat", "dog"]
    assert (len(data.train), len(data.eval)) == (18, 2)
    assert Counter(data.eval.labels) == {0: 1, 1: 1}
    assert data.notes == ["no evaluation split: 2 of 20 training rows held out (10%, stratified, seed 3)"]


def test_folder_of_images_with_splits(tmp_path):
    write_images(tmp_path / "pets" / "train", count=3)
    write_images(tmp_path / "pets" / "validation", count=2)
    write_images(tmp_path / "pets" / "test", count=1)
    data = load_data(str(tmp_path / "pets"))
    assert (data.train.name, len(data.train)) == ("train", 6)
    assert (data.eval.name, len(data.eval)) == ("validation", 4)
    assert not data.notes


def test_a_file_or_folder_for_each_split(tmp_path):
    train = write_csv(tmp_path / "a.csv", text=["x", "y"] * 4, label=[0, 1] * 4)
    held_out = write_csv(tmp_path / "b.csv", text=["x"], label=[1])
    data = load_data({"train": str(train), "validation": str(held_out)})
    assert (len(data.train), data.eval.labels) == (8, [1])
    for name, classes in (("c", ("cat", "dog")), ("d", ("cat", "dog")), ("e", ("cat", "cow"))):
        write_images(tmp_path / name, classes)
    assert len(load_data({"train": str(tmp_path / "c"), "validation": str(tmp_path / "d")}).eval) == 8
    with pytest.raises(DataError, match="classes of the validation split are cat, cow, those of train cat, dog"):
        load_data({"train": str(tmp_path / "c"), "validation": str(tmp_path / "e")})


def test_csv_with_a_pair_of_texts(tmp_path):
    write_csv(tmp_path / "train.csv", premise=["a", "b", "c"], hypothesis=["d", "e", "f"], label=["yes", "no", "yes"])
    write_csv(tmp_path / "validation.csv", premise=["a"], hypothesis=["d"], label=["no"])
    data = load_data(str(tmp_path))
    assert data.task == "text-classification"
    assert data.columns.text == ("premise", "hypothesis")
    assert data.label_names == ["no", "yes"]
    assert data.train.labels == [1, 0, 1]
    assert data.eval.labels == [0]


def test_text_alone_is_language_modelling(tmp_path):
    path = write_csv(tmp_path / "tales.csv", text=["once", "upon", "a", "time"] * 5)
    data = load_data(str(path))
    assert data.task == "text-generation"
    assert data.train.labels is None


def test_task_overrides_what_the_columns_suggest(tmp_path):
    path = write_csv(tmp_path / "reviews.csv", text=["x", "y"] * 6, label=[0, 1] * 6)
    assert load_data(str(path)).task == "text-classification"
    assert load_data(str(path), task="text-generation").task == "text-generation"


def test_csv_of_image_paths_is_relative_to_the_csv(tmp_path):
    write_images(tmp_path / "photos", count=3)
    names = [f"photos/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    path = write_csv(tmp_path / "index.csv", image=names, label=["cat"] * 3 + ["dog"] * 3)
    data = load_data(str(path))
    assert data.task == "image-classification"
    assert data.train.rows[0]["image"].size == (10, 12)


def test_parquet_keeps_class_names_and_image_bytes(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": [Image.new("RGB", (4, 4))] * 4, "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    data = load_data(str(tmp_path))
    assert data.label_names == ["a", "b"]
    assert data.train.labels == [0, 1, 1, 0]
    assert data.eval.name == "test"
    assert data.train.rows[0]["image"].size == (4, 4)


def test_parquet_of_other_programs_holds_images_as_structs(tmp_path):
    rows = {"image": [{"bytes": png(shade), "path": None} for shade in (0, 255)] * 10, "label": ["a", "b"] * 10}
    pq.write_table(pa.table(rows), tmp_path / "images.parquet")
    data = load_data(str(tmp_path / "images.parquet"))
    assert data.task == "image-classification"
    assert data.train.rows[0]["image"].getpixel((0, 0)) == (0, 0, 0)


def test_integer_classes_are_counted_from_zero(tmp_path):
    path = write_csv(tmp_path / "a.csv", text=["x"] * 8, label=[3, 7] * 4)
    data = load_data(str(path))
    assert data.label_names == ["3", "7"]
    assert set(data.train.labels) == {0, 1}


def test_a_split_with_hidden_labels_is_not_used(tmp_path):
    write_csv(tmp_path / "train.csv", sentence=["x"] * 40, label=[0, 1] * 20)
    write_csv(tmp_path / "test.csv", sentence=["x"] * 4, label=[-1] * 4)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.eval)) == (36, 4)
    assert data.notes


def test_samples_are_drawn_from_all_of_a_sorted_split(tmp_path):
    path = write_csv(tmp_path / "a.csv", text=["x"] * 200, label=["a"] * 100 + ["b"] * 100)
    data = load_data(str(path), max_train_samples=20, max_eval_samples=5)
    assert (len(data.train), len(data.eval)) == (20, 5)
    assert len(set(data.train.labels)) == 2


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": ["a"] * 4, "y": ["b"] * 4, "z": ["c"] * 4}, {}, "several columns hold text .x, y, z.*--text-columns"),
        ({"x": [1] * 4, "y": [2] * 4}, {}, "neither an image nor a text column; its columns: x, y"),
        (
            {"text": ["a"] * 4, "n": [2] * 4},
            {"task": "text-classification"},
            "no label column found; name it with --label-column; the columns are text, n",
        ),
        ({"text": ["a"] * 4}, {"label_column": "stars"}, "no column 'stars'; its columns: text"),
        ({"text": ["a"] * 4}, {"task": "image-classification"}, "no image column found.*--image-column"),
        ({"text": ["a"] * 4, "label": ["x"] * 4}, {}, "one class only .'x' in column 'label'."),
        ({"text": ["a"] * 4, "label": [0.5, 1.5, 2.5, 3.5]}, {}, "float values such as 0.5 .row 0 of the train"),
        ({"text": ["a"] * 4, "label": [0, 1, -1, 0]}, {}, "row 2 of the train split has no label"),
        ({"text": ["a"], "label": [0]}, {}, "one class only"),
        ({"text": ["a"]}, {}, "1 rows: too few to hold any out"),
    ],
)
def test_unfit_columns_are_named(tmp_path, columns, options, message):
    path = write_csv(tmp_path / "data.csv", **columns)
    with pytest.raises(DataError, match=message) as caught:
        load_data(str(path), **options)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere.csv"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_data(name)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match="holds neither .*parquet.* nor images"):
        load_data(str(tmp_path))


def test_damaged_file_names_itself(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"this is not parquet")
    with pytest.raises(DataError, match=r"train\.parquet"):
        load_data(str(tmp_path))


def test_unknown_hub_name_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'no-such-set' is neither bundled \(digits\), nor a local path"):
        load_data("no-such-set")


def test_validation_class_that_training_lacks_is_kept_apart(tmp_path):
    write_csv(tmp_path / "train.csv", text=["x"] * 4, label=["a", "b"] * 2)
    write_csv(tmp_path / "validation.csv", text=["x"], label=["c"])
    with pytest.raises(DataError, match="'c' in row 0 of the validation split does not occur in the train split"):
        load_data(str(tmp_path))
