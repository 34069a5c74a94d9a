import pytest
import timm
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from sparse_ft.masks import prunable_layers

BERT = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 8,
}  # fmt: skip


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8, 2)
    )


def test_auto_leaves_stem_depthwise_and_head_dense():
    layers = prunable_layers(small_cnn())
    assert list(layers) == ["3"]
    assert layers.skipped == {"0": "stem", "2": "depthwise", "5": "classifier head"}


def test_empty_ignore_takes_every_layer():
    assert list(prunable_layers(small_cnn(), ignore=[])) == ["0", "2", "3", "5"]


def test_grouped_convolution_is_not_depthwise():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 2))
    assert list(prunable_layers(model)) == ["1"]


def test_pointwise_convolution_of_one_channel_is_not_depthwise():
    model = nn.Sequential(nn.Conv1d(2, 1, 3), nn.Conv1d(1, 4, 3), nn.Conv3d(4, 4, 1), nn.Linear(8, 2))
    assert list(prunable_layers(model)) == ["1", "2"]


def test_single_layer_has_neither_stem_nor_head():
    assert list(prunable_layers(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))) == ["1"]
    assert list(prunable_layers(nn.Linear(4, 4))) == [""]


def test_last_convolution_is_the_head_without_linear_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 10, 1))
    assert prunable_layers(model).skipped == {"0": "stem", "2": "classifier head"}


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [
        ("resnet10t", {"conv1.0"}, {"fc"}),
        ("mobilenetv3_small_050", {"conv_stem"}, {"classifier"}),
        ("test_vit", {"patch_embed.proj"}, {"head"}),
        ("test_convnext", {"stem.0"}, {"head.fc"}),
        ("deit_tiny_distilled_patch16_224", {"patch_embed.proj"}, {"head", "head_dist"}),
    ],
)
def test_timm_stem_and_head(name, stem, head):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    skipped = prunable_layers(model).skipped
    assert {layer for layer, reason in skipped.items() if reason == "stem"} == stem
    assert {layer for layer, reason in skipped.items() if reason == "classifier head"} == head
    assert set(skipped.values()) <= {"stem", "classifier head", "depthwise"}


def test_timm_backbone_prunes_its_last_layer():
    model = timm.create_model("test_resnet", num_classes=0)
    assert set(prunable_layers(model).skipped.values()) == {"stem"}


def test_timm_model_inside_transformers():
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3))
    assert prunable_layers(model).skipped == {"timm_model.conv1.0": "stem", "timm_model.fc": "classifier head"}


def test_bert_prunes_the_encoder_only():
    layers = prunable_layers(BertForSequenceClassification(BertConfig(**BERT)))
    assert all(name.startswith("bert.encoder.layer.0.") for name in layers) and len(layers) == 6
    assert layers.skipped == {"bert.pooler.dense": "classifier head", "classifier": "classifier head"}


def test_masked_language_model_head_is_dense():
    layers = prunable_layers(BertForMaskedLM(BertConfig(**BERT)))
    assert all(name.startswith("bert.encoder.") for name in layers)
    assert set(layers.skipped) == {"cls.predictions.transform.dense", "cls.predictions.decoder"}


def test_distilbert_pre_classifier_is_part_of_the_head():
    config = DistilBertConfig(vocab_size=20, dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    assert set(prunable_layers(DistilBertForSequenceClassification(config)).skipped) == {
        "pre_classifier",
        "classifier",
    }


def test_gpt2_conv1d_is_pruned_and_its_tied_head_is_not():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    layers = prunable_layers(model)
    assert list(layers) == [
        "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]  # fmt: skip
    assert layers.skipped == {"lm_head": "classifier head"}


@pytest.mark.parametrize("tied", [True, False])
def test_llama_head(tied):
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    layers = prunable_layers(LlamaForCausalLM(config))
    assert len(layers) == 7
    assert set(layers.skipped) == {"lm_head"}


def test_t5_head_is_found_by_name():
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False)
    assert set(prunable_layers(T5ForConditionalGeneration(config)).skipped) == {"lm_head"}


def test_weights_tied_to_an_embedding_are_left_dense():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.body = nn.Linear(4, 4)
            self.projection = nn.Linear(4, 10, bias=False)
            self.projection.weight = self.embedding.weight
            self.last = nn.Linear(4, 2)

    layers = prunable_layers(Decoder())
    assert list(layers) == ["body"]
    assert layers.skipped["projection"] == "tied to embedding"


def test_layer_used_in_several_places_is_one_layer():
    model = AlbertModel(AlbertConfig(**BERT, embedding_size=4))
    assert len(prunable_layers(model)) == len({id(layer) for layer in prunable_layers(model).values()}) == 7
    shared = nn.Linear(4, 4)
    assert list(prunable_layers(nn.Sequential(shared, shared, nn.Linear(4, 2)))) == ["0"]


def test_second_user_of_a_parameter_is_skipped_even_if_nothing_is_ignored():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    layers = prunable_layers(model, ignore=[])
    assert list(layers) == ["0"]
    assert layers.skipped == {"1": "tied to 0"}


def test_weights_that_are_no_ordinary_parameters_are_skipped():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(normed, nn.LazyLinear(4), nn.Linear(4, 4))
    assert prunable_layers(model, ignore=[]).skipped == {
        "0": "weight is not a parameter of its own",
        "1": "weight is not initialised yet",
    }


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["0", "5"], ["2", "3"]),
        (["3.weight"], ["0", "2", "5"]),
        (["module.3"], ["0", "2", "5"]),
        (["re:[02]"], ["3", "5"]),
        ([r"re:module\.[02]"], ["3", "5"]),
        ([r"re:.*\.weight$"], []),
        (["auto", "3"], []),
    ],
)
def test_ignore_by_name(ignore, left):
    assert list(prunable_layers(small_cnn(), ignore)) == left


def test_wrappers_do_not_change_names():
    model = small_cnn()
    names = list(prunable_layers(model))
    assert list(prunable_layers(nn.DataParallel(model))) == names
    assert list(prunable_layers(torch.compile(model))) == names


def test_layer_called_module_keeps_its_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

    assert list(prunable_layers(Model(), ignore=["module"])) == ["head"]


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["clasifier"], r"'clasifier' matches no prunable layer; did you mean 'classifier'\?"),
        (["features"], r'for the 2 layers inside it write "re:features\\\\?\."'),
        (["re:encoder"], "'re:encoder' matches no prunable layer; the first layers are 'features.0'"),
        (["re:("], r"'re:\(' is not a regular expression"),
        ("features.0", 'ignore must be "auto" or a list of layer names'),
        ([3], "layer names must be strings, not int"),
    ],
)
def test_wrong_ignore_is_explained(ignore, message):
    model = nn.ModuleDict({"features": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "classifier": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=message):
        prunable_layers(model, ignore)
