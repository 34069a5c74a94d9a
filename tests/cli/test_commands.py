"""The commands do their work, say what they did, and fail in one line."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import sparse_ft
from sparse_ft import footprint
from sparse_ft.cli import COMMANDS
from sparse_ft.cli.env import OPENMP_LIBRARY

QUICK = ("--no-keep-memory", "--sparse-policy", "always", "--disable-tqdm", "true")


def one_error(stderr, command):
    """The error line; there is exactly one, and no traceback."""
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith(f"sparse-ft {command}: error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    return errors[0]


def test_help_lists_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run()[:2] == (0, out)


def test_version(run):
    assert run("--version") == (0, f"sparse-ft {sparse_ft.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert out.startswith(f"usage: sparse-ft {command}")
    assert "examples:\n" in out
    assert "--debug" in out


def test_every_training_argument_is_an_option(run):
    _, usual, _ = run("finetune", "--help")
    status, everything, _ = run("finetune", "--help-all")
    assert status == 0
    assert "--ddp-backend" in everything and "--ddp-backend" not in usual
    assert "--sparse-policy" in usual


def test_unknown_command_and_option(run):
    status, _, err = run("finetun")
    assert status == 2
    assert "no command 'finetun'; did you mean 'finetune'?" in err
    status, _, err = run("inspect", "somewhere", "--colour")
    assert status == 2
    assert "unrecognized arguments: --colour" in err


def test_finetune_images(run, image_model, tmp_path):
    out_dir = tmp_path / "out"
    arguments = ("finetune", "--model", image_model, "--dataset", "digits", "--output-dir", out_dir, *QUICK)
    arguments += (
        "--epochs",
        6,
        "--lr",
        0.01,
        "--eval-on-start",
        "--max-train-samples",
        500,
        "--max-eval-samples",
        100,
    )
    status, out, err = run(*arguments, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["native_layers"] == result["pruned_layers"] == 14
    assert result["sparsity_before"] == result["sparsity_after"]
    assert result["metrics_after"]["accuracy"] > 0.4 > result["metrics_before"]["accuracy"]
    assert result["steps"]["dense_ms"] > 0 and result["steps"]["sparse_ms"] > 0
    expected = {"model.safetensors", "config.json", "README.md", "sparse_ft.json", "report.html"}
    assert expected | {"train_results.json", "eval_results.json"} <= set(result["files"])
    assert json.loads((out_dir / "eval_results.json").read_text())["eval_accuracy"] > 0.4
    assert "accuracy" in (out_dir / "README.md").read_text()
    # Stock timm loads it, with the zeros that the model had before and the names of the classes.
    weights, before = load_file(out_dir / "model.safetensors"), load_file(image_model / "model.safetensors")
    assert torch.equal(weights["layer1.0.conv1.weight"] == 0, before["layer1.0.conv1.weight"] == 0)
    assert timm.create_model(f"local-dir:{out_dir}", pretrained=True).num_classes == 10
    assert json.loads((out_dir / "config.json").read_text())["label_names"] == [str(d) for d in range(10)]

    status, _, err = run(*arguments)
    assert status == 2
    assert "holds an earlier run: --resume goes on with it, --overwrite starts anew" in err
    status, out, _ = run(*arguments, "--resume")  # the run is complete: nothing is left but to evaluate
    assert status == 0
    assert "14 of 14 pruned layers run on the sparse kernels" in out
    status, out, _ = run(*arguments, "--overwrite", "--max-steps", 2, "--no-compare")
    assert status == 0
    assert sorted(p.name for p in out_dir.glob("checkpoint-*")) == ["checkpoint-2"]


def test_finetune_a_folder_of_images_with_plain_options(run, image_model, tmp_path):
    for name, shade in (("dark", 20), ("light", 230)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 24), (shade, shade, shade + i)).save(tmp_path / "photos" / name / f"{i}.png")
    status, out, err = run(
        "finetune", "--model", image_model, "--dataset", tmp_path / "photos", "--output-dir", tmp_path / "out", *QUICK,
        "--num_train_epochs", 2, "--per_device_train_batch_size", 8, "--no-compare", "--seed", 7,
    )  # fmt: skip
    assert status == 0, err
    assert "no evaluation split: 2 of 24 training rows held out (10%, stratified, seed 7)" in err
    assert "not compared" in out
    assert "3 epochs" not in out and "2 epochs" in out


def test_finetune_text(run, text_model, reviews, tmp_path):
    arguments = ("--output-dir", tmp_path / "out", *QUICK, "--lr", 0.02, "--batch-size", 8, "--json")
    status, out, err = run("finetune", "--model", text_model, "--dataset", reviews, *arguments)
    assert status == 0, err
    result = json.loads(out)
    assert result["task"] == "text-classification"
    assert result["metrics_after"]["accuracy"] == 1.0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"no": 0, "yes": 1}


def test_finetune_a_language_model(run, language_model, tmp_path):
    (tmp_path / "tales.txt").write_text("the film was very good\na bad plot\n" * 100)
    status, out, err = run(
        "finetune", "--model", language_model, "--dataset", tmp_path / "tales.txt", "--output-dir", tmp_path / "out",
        *QUICK, "--max-length", 8, "--lr", 0.02, "--json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    assert result["task"] == "text-generation"
    assert result["metrics_after"]["perplexity"] < 6


def test_prune_and_inspect(run, tmp_path):
    arguments = ("prune", "--model", "timm/test_resnet", "--output-dir", tmp_path / "pruned", "--scope", "global")
    status, out, err = run(*arguments, "--sparsity", 0.7)
    assert status == 0, err
    assert "70.00% in the layers with zeros" in out
    assert f"saved to {tmp_path / 'pruned'}" in out
    status, out, _ = run("inspect", tmp_path / "pruned", "--min-sparsity", 0.0)
    assert status == 0
    assert "14 native" in out
    assert "classifier head" in out
    page, plot = tmp_path / "page.html", tmp_path / "plot.png"
    status, out, _ = run("inspect", tmp_path / "pruned", "--json", "--html", page, "--plot", plot)
    report = json.loads(out)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["fc"]["native"] is False and layers["fc"]["reason"] == "sparsity below 50%"
    assert report["native_layers"] == sum(layer["native"] for layer in layers.values())
    assert "layer1.0.conv1" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_prune_by_a_recipe(run, tmp_path):
    (tmp_path / "half.yaml").write_text(
        "share: 0.5\nmodifiers:\n  - !OneShotPruningModifier {params: ['re:layer[12].*conv1.weight'],"
        " sparsity: eval(share), start_epoch: 3}\n"
    )
    arguments = ("prune", "--model", "timm/test_resnet", "--output-dir", tmp_path / "pruned")
    status, out, err = run(*arguments, "--recipe", tmp_path / "half.yaml", "--recipe-args", "share=0.6")
    assert status == 0, err
    assert "60.00% in the layers with zeros" in out
    status, _, err = run(*arguments, "--recipe", tmp_path / "half.yaml", "--scope", "global")
    assert (status, "--scope is the recipe's own" in err) == (2, True)
    status, _, err = run(*arguments, "--recipe-args", "share=0.6")
    assert (status, "--recipe-args needs a --recipe" in err) == (2, True)


def test_bench(run, image_model, tmp_path):
    plot = tmp_path / "layers.svg"
    options = ("--batch-size", 2, "--image-size", 32, "--steps", 1, "--no-keep-memory")
    status, out, err = run("bench", image_model, *options, "--policy", "always", "--json", "--no-memory")
    assert status == 0, err
    result = json.loads(out)
    assert sum(layer["converted"] for layer in result["layers"]) == 14
    assert result["step"]["sparse_ms"] > 0 and result["memory"] == {}
    assert set(result["step"]["variants"]) > {"sparse", "dense channels_last", "dense bf16 channels_last"}
    status, out, err = run("bench", image_model, *options, "--plot", plot, "--no-memory", "--no-bf16")
    assert status == 0, err
    assert "training step: dense" in out or "no layer runs sparse: the training step is the dense one" in out
    assert "bf16" not in out and "peak MB: " not in out
    assert "<svg" in plot.read_text()


def test_bench_of_a_text_model(run, text_model):
    options = ("--batch-size", 2, "--seq-len", 8, "--steps", 1, "--no-keep-memory", "--policy", "always")
    status, out, err = run("bench", text_model, *options, "--optimizer", "adamw", "--no-bf16")
    assert status == 0, err
    assert "training step: dense" in out and "2, 8 tokens, adamw, 1 thread" in out
    if footprint.can_measure():
        assert "MB held between steps" in out and "peak MB: the whole process" in out


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 1, "n_head": 2},
        {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64},
        {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64, "image_size": 32},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_bench_of_a_configuration(run, tmp_path, config):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config | {"vocab_size": 50} if config["model_type"] != "vit" else config))
    options = ("--sparsity", 0.9, "--batch-size", 2, "--steps", 1, "--no-keep-memory", "--policy", "always")
    status, out, err = run("bench", path, *options, "--no-memory", "--no-bf16")
    assert status == 0, err
    assert "training step: dense" in out and "pruned layers 90" in out


@pytest.mark.parametrize(
    ("text", "message"), [("{", "model.json: "), ('{"model_type": "konvnet"}', "model.json: "), ("[]", "model.json")]
)
def test_bench_of_a_configuration_that_is_none(run, tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    status, _, err = run("bench", path, "--sparsity", 0.9)
    assert status == 1
    assert message in one_error(err, "bench")


def test_bench_of_a_dense_model(run):
    status, _, err = run("bench", "timm/test_resnet", "--image-size", 32, "--batch-size", 2, "--no-keep-memory")
    assert status == 2
    assert "no layer can run sparse (" in one_error(err, "bench")


def test_env(run):
    status, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert len(facts["openmp_runtimes"]) <= 1
    assert "threads" in run("env")[1]


@pytest.mark.parametrize(
    ("path", "is_runtime"),
    [
        ("/usr/lib/libgomp.so.1", True),
        ("/venv/torch/lib/libgomp-a34b3233.so.1", True),
        ("/opt/libiomp5.so", True),
        ("/opt/homebrew/libomp.dylib", True),
        ("/usr/lib/libgomp-extra/readme.txt", False),
        ("/usr/lib/libcompute.so", False),
    ],
)
def test_openmp_runtimes_are_recognised(path, is_runtime):
    assert bool(OPENMP_LIBRARY.search(path)) is is_runtime


def test_push_without_token(run, image_model, monkeypatch):
    monkeypatch.setattr("sparse_ft.hub.push.get_token", lambda: None)
    status, _, err = run("push", image_model, "user/name")
    assert status == 1
    assert "needs a Hub token" in one_error(err, "push")


def test_push_of_a_folder_without_model(run, tmp_path):
    status, _, err = run("push", tmp_path, "user/name")
    assert status == 1
    assert "has no model to push" in one_error(err, "push")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--model", "/nowhere", "--dataset", "digits"), 1, "model folder '/nowhere' does not exist"),
        (("--model", "{image}", "--dataset", "/nowhere"), 1, "dataset '/nowhere': no such file or folder"),
        (("--model", "{image}", "--dataset", "{unlabelled}"), 1, "is a timm model: its task is image-classification"),
        (
            ("--model", "{text}", "--dataset", "{unlabelled}", "--task", "text-classification"),
            1,
            "no label column found; name it with --label-column; the columns are text",
        ),
        (("--model", "{text}", "--dataset", "digits"), 1, "no bert model for the task image-classification"),
        (("--model", "{disagreeing}", "--dataset", "digits"), 1, "has shape"),
        (("--model", "{image}", "--dataset", "digits", "--sparse-ignore", "layer1.0.conv9"), 1, "layer1.0.conv1"),
        (("--model", "{image}", "--dataset", "digits", "--min-sparsity", "1.5"), 2, "min_sparsity must be in"),
        (("--model", "{image}", "--dataset", "digits", "--optim", "adamx"), 2, "invalid choice: 'adamx'"),
        (("--model", "{image}", "--dataset", "digits", "--batch-size", "many"), 2, "--batch-size"),
        (("--model", "{image}", "--dataset", "digits", "--resume"), 1, "no complete checkpoint to resume from"),
        (
            ("--model", "{image}", "--dataset", "digits", "--load-best-model-at-end", "--save-strategy", "no"),
            2,
            "load_best_model_at_end",
        ),
        (("--model", "{image}", "--dataset", "digits", "--overwrite", "--resume"), 2, "give one of them"),
        (("--model", "{image}", "--dataset", "digits", "--max-train-samples", "0"), 2, "at least 1, not 0"),
        (("--dataset", "digits"), 2, "the following arguments are required: --model"),
    ],
)
def test_finetune_refuses_in_one_line(run, image_model, text_model, tmp_path, options, status, message):
    (tmp_path / "texts.csv").write_text("text\n" + "the film\n" * 20)
    disagreeing = tmp_path / "disagreeing"
    disagreeing.mkdir()
    for name in ("config.json", "model.safetensors"):
        (disagreeing / name).write_bytes((image_model / name).read_bytes())
    config = json.loads((disagreeing / "config.json").read_text())
    (disagreeing / "config.json").write_text(json.dumps(config | {"architecture": "test_resnet", "num_classes": 10,
        "model_args": {"in_chans": 1}}))  # fmt: skip
    names = {
        "{image}": image_model, "{text}": text_model, "{unlabelled}": tmp_path / "texts.csv",
        "{disagreeing}": disagreeing,
    }  # fmt: skip
    argv = [str(names.get(option, option)) for option in options]
    found, _, err = run("finetune", *argv, "--output-dir", tmp_path / "out", *QUICK)
    assert found == status, err
    assert message in one_error(err, "finetune")


@pytest.mark.parametrize("sparsity", ["1.0", "-0.1", "nan", "most"])
def test_sparsity_outside_its_range(run, sparsity, tmp_path):
    status, _, err = run("prune", "--model", "timm/test_resnet", "--output-dir", tmp_path, f"--sparsity={sparsity}")
    assert status == 2
    assert "must be a number from 0 up to but not including 1" in one_error(err, "prune")


def test_layer_name_that_matches_nothing(run, tmp_path):
    status, _, err = run(
        "prune", "--model", "timm/test_resnet", "--output-dir", tmp_path, "--ignore", "auto", "layer1.0.conv3"
    )
    assert status == 1
    line = one_error(err, "prune")
    assert "'layer1.0.conv3' matches no prunable layer" in line
    assert "layer1.0.conv" in line.partition("layer;")[2]
    assert not (tmp_path / "model.safetensors").exists()


def test_damaged_image_is_named(run, image_model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "b" / "3.png").write_bytes(b"damaged")
    status, _, err = run(
        "finetune", "--model", image_model, "--dataset", tmp_path / "photos", "--output-dir", tmp_path / "out", *QUICK
    )
    assert status == 1
    assert "cannot be read" in one_error(err, "finetune")


def test_debug_shows_the_traceback(run, image_model, tmp_path):
    from sparse_ft.data import DataError

    with pytest.raises(DataError):
        run("finetune", "--model", image_model, "--dataset", "/nowhere", "--output-dir", tmp_path, "--debug")
