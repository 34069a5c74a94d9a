"""Datasets fitted to models: images, texts, collators, metrics."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from dataset_files import write_csv, write_images
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from sparse_ft.data import DataError, load_data, prepare
from sparse_ft.data.images import ImageCollator, ImageSpec, eval_transform, image_spec, train_transform
from sparse_ft.data.prepare import accuracy, predicted_class


@pytest.fixture
def resnet():
    return timm.create_model("resnet18", num_classes=10)


@pytest.fixture
def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip


@pytest.fixture
def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def test_spec_of_a_timm_model(resnet):
    spec = image_spec(resnet)
    assert spec == ImageSpec(224, 224, interpolation="bicubic", crop_pct=resnet.pretrained_cfg["crop_pct"])
    assert image_spec(resnet, image_size=32).size == (32, 32)


def test_size_and_crop_are_recorded_in_the_model(resnet):
    prepare(load_data("digits"), resnet, image_size=32)
    stock = timm.data.resolve_model_data_config(resnet)
    assert (stock["input_size"], stock["crop_mode"], stock["crop_pct"]) == ((3, 32, 32), "squash", 1.0)
    assert image_spec(resnet) == ImageSpec(32, 32, crop_pct=None)


def test_spec_of_a_one_channel_timm_model():
    model = timm.create_model("resnet18", in_chans=1)
    assert image_spec(model).channels == model.pretrained_cfg["input_size"][0]


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ({"height": 48, "width": 64}, None, ((48, 64), None)),
        ({"shortest_edge": 256}, {"height": 224, "width": 224}, ((224, 224), 224 / 256)),
        ({"shortest_edge": 96}, None, ((96, 96), 1.0)),
    ],
)
def test_spec_of_an_image_processor(size, crop, expected):
    processor = SimpleNamespace(
        size=size,
        crop_size=crop,
        do_center_crop=crop is not None,
        image_mean=[0.5] * 3,
        image_std=[0.2] * 3,
        resample=3,
    )
    spec = image_spec(torch.nn.Identity(), processor)
    assert (spec.size, spec.crop_pct) == expected
    assert (spec.mean, spec.std, spec.interpolation) == ((0.5,) * 3, (0.2,) * 3, "bicubic")


def test_evaluation_images_agree_with_timm(resnet):
    """The same pixels as timm's own evaluation transform, so that published accuracies hold."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 260, 3), dtype=np.uint8))
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(resnet), is_training=False)(image)
    spec = image_spec(resnet)
    ours = ImageCollator(spec.mean, spec.std)([{"pixel_values": eval_transform(spec)(image)}])["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_augmentation_follows_seed_epoch_and_row_only(resnet):
    data = load_data("digits", max_train_samples=8)

    def image(row, seed=0, epoch=0):
        train = prepare(data, resnet, image_size=16, seed=seed).train
        train.set_epoch(epoch)
        before = torch.get_rng_state()
        pixels = train[row]["pixel_values"]
        assert torch.equal(torch.get_rng_state(), before)
        return pixels

    torch.manual_seed(1)
    first = image(0)
    torch.manual_seed(2)
    assert torch.equal(first, image(0))
    assert not torch.equal(first, image(0, epoch=1))
    assert not torch.equal(first, image(0, seed=1))


def test_characters_are_not_mirrored():
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 4, 8))  # bright on the left
    spec = ImageSpec(16, 16)
    for augment in ("light", "standard"):
        digits = train_transform(spec, augment, glyphs=True)
        images = torch.stack([digits(half.convert("RGB")) for _ in range(30)])
        assert (images[..., 0].float().mean((1, 2)) >= images[..., -1].float().mean((1, 2))).all()
        mirrored = torch.stack([train_transform(spec, augment)(half.convert("RGB")) for _ in range(30)])
        assert (mirrored[..., 0].float().mean((1, 2)) < mirrored[..., -1].float().mean((1, 2))).any()


def test_without_augmentation_training_images_are_evaluation_images(resnet):
    data = load_data("digits", max_train_samples=4)
    none = prepare(data, resnet, image_size=16, augment="none").train
    none.set_epoch(3)
    assert torch.equal(none[0]["pixel_values"], eval_transform(ImageSpec(16, 16, crop_pct=None))(none._read(0)))


def test_image_batch(resnet):
    prepared = prepare(load_data("digits"), resnet, image_size=16)
    batch = prepared.collator([prepared.train[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    assert batch["labels"].dtype == torch.int64
    assert resnet(batch["pixel_values"]).shape == (5, 10)


def test_images_of_different_shapes_do_not_make_a_batch(resnet):
    collator = prepare(load_data("digits"), resnet).collator
    with pytest.raises(DataError, match=r"different shapes: \(3, 4, 4\), \(3, 5, 5\)"):
        collator([{"pixel_values": torch.zeros(3, n, n), "labels": 0} for n in (4, 5)])


def test_damaged_image_is_named_by_its_row(tmp_path, resnet):
    folder = write_images(tmp_path / "pets", count=10)
    (folder / "dog" / "3.png").write_bytes(b"not an image")
    prepared = prepare(load_data(str(folder)), resnet, image_size=16)
    with pytest.raises(DataError, match=r"image in row \d+ of the (train|validation) split cannot be read: .*3\.png"):
        for split in (prepared.train, prepared.eval):
            for row in range(len(split)):
                split[row]


def test_text_batch_is_padded_to_its_longest_row(tmp_path, bert, tokenizer):
    path = write_csv(tmp_path / "t.csv", text=["a b", "a b c d", "e", "f g"] * 5, label=[0, 1, 0, 1] * 5)
    prepared = prepare(load_data(str(path)), bert, tokenizer)
    batch = prepared.collator([prepared.train[i] for i in range(4)])
    longest = max(len(prepared.train[i]["input_ids"]) for i in range(4))
    assert batch["input_ids"].shape == (4, longest)
    assert set(batch["labels"].tolist()) <= {0, 1}
    assert torch.isfinite(bert(**batch).loss)


def test_max_length_beyond_the_model(tmp_path, bert, tokenizer):
    path = write_csv(tmp_path / "t.csv", text=["a b c"] * 20, label=[0, 1] * 10)
    with pytest.raises(DataError, match="max length 20 is more than the 16 tokens"):
        prepare(load_data(str(path)), bert, tokenizer, max_length=20)
    cut = prepare(load_data(str(path)), bert, tokenizer, max_length=2)
    assert len(cut.train[0]["input_ids"]) == 2


def test_text_needs_a_tokenizer(tmp_path, bert):
    path = write_csv(tmp_path / "t.csv", text=["a"] * 20, label=[0, 1] * 10)
    with pytest.raises(DataError, match="needs a tokenizer"):
        prepare(load_data(str(path)), bert)


def test_language_modelling_blocks_join_the_lines(tmp_path, bert, tokenizer):
    (tmp_path / "train.txt").write_text("a b c\nd e\n" * 10)
    (tmp_path / "test.txt").write_text("a b c\nd e\n" * 4)
    prepared = prepare(load_data(str(tmp_path)), bert, tokenizer, max_length=7)
    assert len(prepared.train) == 50 // 7
    assert tokenizer.decode(prepared.train[0]["input_ids"]) == "a b c d e a b"
    batch = prepared.collator([prepared.train[i] for i in range(2)])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    with pytest.raises(DataError, match="the test split has fewer than 16 tokens") as caught:
        (tmp_path / "test.txt").write_text("a b\n")
        prepare(load_data(str(tmp_path)), bert, tokenizer, max_length=16)
    assert "\n" not in str(caught.value)


def test_accuracy_of_predicted_classes():
    logits = torch.tensor([[0.1, 0.9], [2.0, 1.0], [0.0, 1.0]])
    predictions = predicted_class((logits, None), None).numpy()
    assert accuracy(SimpleNamespace(predictions=predictions, label_ids=np.array([1, 0, 0]))) == {"accuracy": 2 / 3}
