"""Damaged files of every kind that is read: a clear error or a correct result, in little time and memory.

A few hundred cases run by default; `make test-slow` runs all of them. A failure prints the kind and the seed of the
case; `case_of(kind, seed)` repeats it.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from mutate import NUMBERS, OTHERS, mutate_bytes, mutate_json, mutate_safetensors
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import sparse_ft
from sparse_ft.checkpoint import CheckpointError, read_session, read_sparse_state, write_session
from sparse_ft.hub import ModelError, bitmap, compact, from_pretrained, save_pretrained
from sparse_ft.hub.card import model_card
from sparse_ft.hub.foreign import bitmask, read_checkpoint
from sparse_ft.masks import mask_state, sparsity
from sparse_ft.ops import SparsePattern
from sparse_ft.recipes import Recipe, RecipeError

CASES = {  # kind: cases by default, cases in all
    "compact": (150, 8_000),
    "masks": (50, 2_000),
    "bitmask": (60, 2_500),
    "pickle": (60, 2_500),
    "index": (40, 1_000),
    "config": (25, 2_000),
    "recipe": (80, 4_000),
    "card": (20, 1_500),
    "checkpoint": (30, 1_500),
}
LONGEST_MESSAGE = 1000

ROOT = Path(__file__).parents[3]
RECIPES = [ROOT / "recipes", Path(os.environ.get("SPARSE_FT_SHARED", "../shared")) / "compat" / "recipes"]


def one_clear_line(error: Exception) -> None:
    text = str(error)
    assert text.strip() and "\n" not in text and len(text) < LONGEST_MESSAGE, f"not one clear line: {text!r:.2000}"


def a_state_dict() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {"bias": torch.randn(6, generator=generator), "steps": torch.tensor(3)}
    masks = {}
    for name, shape, density in (
        ("a.weight", (6, 4, 3, 3), 0.1),
        ("b.weight", (9, 50), 0.02),
        ("c.weight", (5, 7), 0.6),
    ):
        masks[name] = torch.rand(shape, generator=generator) < density
        state[name] = torch.randn(shape, generator=generator) * masks[name]
    return state, masks


def usable(state_dict: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """What was read keeps the promises of the format, and a kernel takes the pattern."""
    for name, mask in masks.items():
        weight = state_dict[name]
        assert mask.dtype == torch.bool and mask.shape == weight.shape
        assert not torch.any(weight[~mask])
        if weight.dim() in (2, 4) and weight.dtype == torch.float32 and weight.numel() < 10_000:
            pattern, values = SparsePattern.build(weight, mask)
            assert pattern.nnz == int(mask.sum()) and torch.equal(pattern.mask(), mask)
            if weight.dim() == 2 and torch.isfinite(weight).all():
                x = torch.ones(2, weight.shape[1])
                y = torch.ops.sparse_ft.linear(x, values, None, pattern.tensors, weight.shape[1], weight.shape[0])
                torch.testing.assert_close(y, x @ weight.t(), equal_nan=True)


class Kind:
    """A kind of file: a good one made once, and what becomes of a damaged one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, draw: random.Random) -> str:
        """Damages and reads; returns the outcome."""
        raise NotImplementedError


class Compact(Kind):
    def __init__(self, folder: Path):
        super().__init__(folder)
        state, masks = a_state_dict()
        save_file(*self.packed(state, masks)[:1], folder / "good", self.packed(state, masks)[1])
        self.good = (folder / "good").read_bytes()

    @staticmethod
    def packed(state: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, entries = compact.pack((name, tensor, masks.get(name)) for name, tensor in state.items())
        return tensors, compact.metadata(entries)

    def run(self, draw: random.Random) -> str:
        path = self.folder / "damaged.safetensors"
        path.write_bytes(mutate_safetensors(self.good, draw))
        try:
            result = self.read(path)
        except ValueError as error:
            one_clear_line(error)
            return "refused"
        usable(*result)
        return "read"

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return compact.unpack(path)


class Masks(Compact):
    def __init__(self, folder: Path):
        super().__init__(folder)
        bitmap.write_masks(folder / "good", a_state_dict()[1])
        self.good = (folder / "good").read_bytes()

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        masks = bitmap.read_masks(path)
        return {name: mask.float() for name, mask in masks.items()}, masks


class Bitmask(Compact):
    def __init__(self, folder: Path):
        super().__init__(folder)
        tensors = {"bias": torch.ones(3)}
        for name, mask in a_state_dict()[1].items():
            stem, bits = name.removesuffix(".weight"), torch.zeros(*mask.shape[:-1], -(-mask.shape[-1] // 8))
            for place in mask.nonzero().tolist():
                bits[(*place[:-1], place[-1] // 8)] += 2 ** (place[-1] % 8)
            tensors |= {f"{stem}.shape": torch.tensor(mask.shape), f"{stem}.bitmask": bits.to(torch.uint8)}
            tensors |= {f"{stem}.compressed": torch.randn(int(mask.sum()))}
        self.good = save(tensors)

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        path = path.rename(path.with_name("model.safetensors"))
        return bitmask.read(path.parent)


class Pickle(Kind):
    """Checkpoint files with torch.nn.utils.prune's entries, in torch's archive and in its old format."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        state, masks = a_state_dict()
        for name, mask in masks.items():
            state[f"{name}_orig"], state[f"{name}_mask"] = state.pop(name), mask.float()
        self.good = []
        for archive in (True, False):
            torch.save({"state_dict": state, "epoch": 3}, folder / "good", _use_new_zipfile_serialization=archive)
            self.good.append((folder / "good").read_bytes())

    def run(self, draw: random.Random) -> str:
        path = self.folder / "damaged.pth"
        path.write_bytes(mutate_bytes(draw.choice(self.good), draw))
        try:
            checkpoint = read_checkpoint(path)
        except ModelError as error:
            one_clear_line(error)
            return "refused"
        usable(checkpoint.state_dict, checkpoint.masks)
        return "read"


class Index(Kind):
    """The index of sharded weights: whatever it names lies beside it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        state, _ = a_state_dict()
        names = sorted(state)
        self.content: dict[str, Any] = {"metadata": {"total_size": 5}, "weight_map": {}}
        for number, part in enumerate((names[:2], names[2:])):
            save_file({name: state[name] for name in part}, folder / f"model-{number}.safetensors")
            self.content["weight_map"] |= dict.fromkeys(part, f"model-{number}.safetensors")

    def run(self, draw: random.Random) -> str:
        path = self.folder / "model.safetensors.index.json"
        text = json.dumps(mutate_json(self.content, draw)).encode("utf-8", "surrogatepass")
        path.write_bytes(mutate_bytes(text, draw) if draw.random() < 0.4 else text)
        try:
            read_checkpoint(path)
        except ModelError as error:
            one_clear_line(error)
            return "refused"
        return "read"


class Config(Kind):
    """A folder of a model whose config.json is damaged, opened as a user does."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        from tiny_models import tiny_bert, tiny_resnet

        self.folders = []
        for name, model in (("timm", tiny_resnet()), ("transformers", tiny_bert())):
            save_pretrained(model, folder / name)
            config = json.loads((folder / name / "config.json").read_text())
            self.folders.append((folder / name, config, load_file(folder / name / "model.safetensors")))

    def run(self, draw: random.Random) -> str:
        folder, config, weights = draw.choice(self.folders)
        text = json.dumps(mutate_json(config, draw)).encode("utf-8", "surrogatepass")
        (folder / "config.json").write_bytes(mutate_bytes(text, draw) if draw.random() < 0.2 else text)
        try:
            model = from_pretrained(folder, policy="always")
        except ModelError as error:
            one_clear_line(error)
            return "refused"
        masks = mask_state(model)
        for name, tensor in model.state_dict().items():
            if name in weights and name in masks:
                assert torch.equal(tensor, weights[name]), f"{name} was changed"
        return "read"


class RecipeText(Kind):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.texts = [
            path.read_bytes()
            for root in RECIPES
            for path in sorted(root.rglob("*"))
            if path.suffix in (".yaml", ".md") and path.name != "README.md"
        ]
        assert self.texts

    def run(self, draw: random.Random) -> str:
        content = mutate_bytes(draw.choice(self.texts), draw)
        if draw.random() < 0.3:
            content = mutate_bytes(content, draw)
        path = self.folder / draw.choice(["recipe.yaml", "recipe.md"])
        path.write_bytes(content)
        try:
            recipe = Recipe.load(path, ignore_unknown=True)
        except RecipeError as error:
            one_clear_line(error)
            return "refused"
        assert Recipe.load(recipe.dump(), ignore_unknown=True).dump() == recipe.dump()
        return "read"


class Card(Kind):
    """Cards written with a stranger's texts: what the metadata says is what was given, and nothing else."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.report = sparsity(sparse_ft.hub.load_model("timm/resnet18", num_labels=3))

    def run(self, draw: random.Random) -> str:
        texts = [
            "---\nlicense: mit\n---\n", "a: b", "{{ 7 * 7 }}", "{% for x in y %}", "`", "|", "</details>", "\x00",
            "\\", "\u2028", "# x", "user/name", "", " ", "'", '"', "\ud800", "- x", "![x](http://x)", "\r\n",
        ]  # fmt: skip

        def text() -> str:
            return "".join(draw.choice(texts) for _ in range(draw.randint(1, 3)))

        given = {
            name: text() for name in ("license", "title", "description", "dataset_name", "model_id", "base_model")
        }
        given = {name: value for name, value in given.items() if draw.random() < 0.5}
        metrics = {text(): draw.choice([*NUMBERS, *OTHERS]) for _ in range(draw.randint(0, 2))}
        path = self.folder / "README.md"
        try:
            card = model_card(
                library="timm", model_class=text(), task="image-classification", report=self.report, metrics=metrics,
                recipe=draw.choice([None, text()]), has_compact=draw.random() < 0.5,
                card={**given, "datasets": text()},
            )  # fmt: skip
            card.save(path)
        except ValueError:  # of us, or of the Hub's own card classes
            return "refused"
        data = ModelCard.load(path, ignore_metadata_errors=False).data
        assert data.library_name == "timm" and data.tags == ["sparse_ft", "sparsity"]
        assert data.license == (given.get("license") or None)
        return "read"


class TrainingCheckpoint(Kind):
    """What a resumed run reads beside the weights."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        from tiny_models import tiny_bert

        self.model = tiny_bert()
        self.folder = folder
        self.info = {"native_layers": ["bert.encoder.layer.0.output.dense"], "metrics": {}}
        write_session(
            folder, {"step": 3, "modifiers": [{"mask": torch.ones(9, dtype=torch.bool), "x": torch.ones(2)}]}
        )
        self.session = next(folder.glob("*.safetensors"))
        self.good = self.session.read_bytes()

    def run(self, draw: random.Random) -> str:
        (self.folder / "sparse_ft.json").write_bytes(
            mutate_bytes(json.dumps(mutate_json(self.info, draw)).encode("utf-8", "surrogatepass"), draw)
        )
        self.session.write_bytes(mutate_safetensors(self.good, draw))
        outcome = "read"
        for read in (lambda: read_sparse_state(self.folder, self.model), lambda: read_session(self.folder)):
            try:
                read()
            except CheckpointError as error:
                one_clear_line(error)
                outcome = "refused"
        return outcome


KINDS: dict[str, type[Kind]] = {
    "compact": Compact, "masks": Masks, "bitmask": Bitmask, "pickle": Pickle, "index": Index, "config": Config,
    "recipe": RecipeText, "card": Card, "checkpoint": TrainingCheckpoint,
}  # fmt: skip


def run_cases(kind: str, first: int, last: int, folder: Path, guarded: Callable[[Callable[[], None]], None]) -> None:
    subject = KINDS[kind](folder)
    outcomes: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            guarded(lambda seed=seed: outcomes.update([subject.run(random.Random(f"{kind} {seed}"))]))
        except BaseException as error:
            error.add_note(f"case: {kind} {seed}")
            raise
    print(kind, dict(outcomes))
    assert outcomes["refused"] and outcomes["read"], f"damage of one outcome alone shows little: {outcomes}"


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")
def test_some_damage(kind, tmp_path, guarded):
    run_cases(kind, 0, CASES[kind][0], tmp_path, guarded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")
def test_much_damage(kind, tmp_path, guarded):
    run_cases(kind, CASES[kind][0], CASES[kind][1], tmp_path, guarded)


def test_the_corpus_is_as_large_as_claimed():
    assert sum(cases for _, cases in CASES.values()) >= 20_000
