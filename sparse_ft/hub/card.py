"""The model card (README.md) of a sparse checkpoint."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sparse_ft.masks import SparsityReport
from sparse_ft.recipes import Recipe, RecipeError

from .errors import ModelError

TAGS = ["sparse_ft", "sparsity"]
UNKNOWN_ID = "USER/NAME"  # stands in the card's examples until the repository is known
_METADATA = ("base_model", "datasets", "language", "license", "license_link", "license_name", "tags")
_DENSE = re.compile(r"<!-- dense -->\n.*?<!-- /dense -->\n", re.DOTALL)  # parts of the card, marked in its template
_COMPACT_ONLY = "The checkpoint is in compact form alone, for `sparse_ft` or transformers with `sparse_ft` imported.\n"
_TEXTS = ("dataset_name", "description", "model_id", "speed", "title")


def model_card(
    *,
    library: str,
    model_class: str,
    task: str | None,
    report: SparsityReport,
    metrics: Mapping[str, Any],
    recipe: str | None,
    has_compact: bool,
    card: Mapping[str, Any],
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        library: ``"timm"`` or ``"transformers"``: whose loader the files are for. It stays ``library_name``, which
            decides the code that the Hub's page shows.
        model_class: Name of the model's class or architecture.
        task: Task name of the Hub.
        report: Sparsity of the model.
        metrics: Figures by name. They enter the card's metadata (``model-index``) too when `card` names the dataset,
            by its Hub id in ``datasets`` or in words in ``dataset_name``.
        recipe: Text of the recipe that the model was trained with.
        has_compact: Whether the compact form lies beside.
        card: What only the user knows. Metadata: ``license``, ``license_name``, ``license_link``, ``language``,
            ``datasets``, ``base_model``, further ``tags``. Text: ``title``, ``description``, ``dataset_name``, and
            ``model_id``, the Hub id for the examples. ``speed``: ``dense_ms`` and ``sparse_ms`` of a training step,
            and where they were measured: ``processor`` and ``threads``.

    Raises:
        ModelError: `card` has an entry of another name.
    """
    unknown = [name for name in card if name not in (*_METADATA, *_TEXTS)]
    if unknown:
        raise ModelError(f"model card: unknown entry {unknown[0]!r}; known: {', '.join((*_METADATA, *_TEXTS))}")
    metadata = {name: card[name] for name in _METADATA if card.get(name)}
    if "base_model" in metadata:
        metadata["base_model_relation"] = "finetune"
    model_id = card.get("model_id") or UNKNOWN_ID
    title = card.get("title") or (model_class if model_id == UNKNOWN_ID else model_id.split("/")[-1])
    results = _results(metrics, task, card)
    data = ModelCardData(
        **{**metadata, "tags": [*TAGS, *metadata.get("tags", [])]},
        library_name=library,
        pipeline_tag=task,
        eval_results=results or None,
        model_name=title if results else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "card_template.md"),
        title=title,
        description=card.get("description"),
        model_id=model_id,
        library=library,
        model_class=model_class,
        transformers_class="AutoModelForImageClassification" if library == "timm" else model_class,
        report=report,
        metrics=metrics,
        recipe=recipe and recipe.strip(),
        methods=_methods(recipe),
        has_compact=has_compact,
        speed=card.get("speed"),
    )


def without_dense_weights(text: str) -> str:
    """A card of `model_card` for a repository that holds the compact form alone: what needs the dense weights is left
    out, and the Hub's page shows no code of a library that could not load it. Other cards stay as they are."""
    first, *others = _DENSE.findall(text) or [None]
    if first is None:
        return text
    text = text.replace(first, _COMPACT_ONLY, 1)
    for part in others:
        text = text.replace(part, "", 1)
    card = ModelCard(text)
    card.data["library_name"] = "sparse_ft"
    return str(card)


def _methods(recipe: str | None) -> dict[str, str]:
    """The modifiers of a recipe, each with where its method comes from; empty if this version cannot read it."""
    if recipe is None:
        return {}
    try:
        modifiers = Recipe.load(
            f"{recipe}\n"
        ).modifiers  # a line break: it is a text, never a file's or repository's name
    except RecipeError:
        return {}
    return {modifier.type_name: modifier.source for modifier in modifiers if modifier.source}


def _results(metrics: Mapping[str, Any], task: str | None, card: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics as the Hub has them, where a figure belongs to a task and a dataset: none of those is made up."""
    datasets = card.get("datasets") or []
    dataset = datasets if isinstance(datasets, str) else next(iter(datasets), None)
    name = card.get("dataset_name") or dataset
    if task is None or not name:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset",
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
