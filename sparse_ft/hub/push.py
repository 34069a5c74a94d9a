"""Sparse checkpoints to the Hugging Face Hub."""

import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from torch import nn

from .card import UNKNOWN_ID, without_dense_weights
from .compact import COMPACT_FOLDER
from .compact_folder import has_weights, write_compact_folder
from .errors import LOGIN_HINT, ModelError, explain_hub_error
from .publish import files_to_publish, publish
from .save import STALE_PATTERNS, save_pretrained

_DENSE_PATTERNS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def push_to_hub(
    model_or_dir: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload sparse model",
    compact_only: bool = False,
    values_dtype: torch.dtype | None = None,
    **save_options: Any,
) -> str:
    """Upload a model, or a folder that `save_pretrained` or a training run wrote, in one commit.

    The repository is made if it does not exist. From a folder, ``checkpoint-*``, names that start with ``_`` and
    pickles stay behind; a folder that has no compact form gets one on the way, and is not changed. Files of an earlier
    upload that would contradict this one are deleted. Trouble that passes is waited for; if the push fails for good,
    the repository is as it was.

    Args:
        model_or_dir: A model as `save_pretrained` takes it, or a folder.
        repo_id: ``USER/NAME``, or ``NAME`` for the user of the token.
        private: For a new repository; None takes the account's default.
        revision: Branch to upload to, made if it does not exist; None is the main branch.
        create_pr: Open a pull request against the main branch instead of committing to it.
        token: Hub token with the write permission; None uses the one of the login.
        commit_message: First line of the commit.
        compact_only: Leave the dense weights out. Only `sparse_ft` and transformers with it open such a repository.
        values_dtype: float16 or bfloat16 rounds the values of the compact form; see `save_pretrained`.
        **save_options: For a model: options of `save_pretrained`, such as `metrics` or `card`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ModelError: The folder has no model, a text in it holds a token, there is no token to push with, or the Hub
            refuses; one line says what to do.
    """
    if create_pr and revision is not None:
        raise ModelError("give revision or create_pr, not both: a pull request is against the main branch")
    if not isinstance(model_or_dir, nn.Module):
        if save_options:
            raise ModelError(f"{', '.join(save_options)}: only for a model; a folder is uploaded as it is")
        _check_folder(Path(model_or_dir).expanduser())
    api, repo_id = _connect(repo_id, token)
    with tempfile.TemporaryDirectory(prefix="sparse_ft-") as temporary:
        if isinstance(model_or_dir, nn.Module):
            folder = Path(temporary) / "model"
            save_options["card"] = {"model_id": repo_id, **(save_options.get("card") or {})}
            save_pretrained(model_or_dir, folder, values_dtype=values_dtype, **save_options)
        else:
            folder = Path(model_or_dir).expanduser()
        files = files_to_publish(folder)
        if not any(place.startswith(f"{COMPACT_FOLDER}/") for place in files) or (
            values_dtype is not None and folder.parent != Path(temporary)
        ):
            files |= _compact_form(folder, Path(temporary) / COMPACT_FOLDER, values_dtype)
        if compact_only:
            if f"{COMPACT_FOLDER}/config.json" not in files:
                raise ModelError("compact_only: too little of this model is zero for a compact form")
            files = {place: path for place, path in files.items() if not _matches(place, _DENSE_PATTERNS)}
        files |= _card(files, repo_id, Path(temporary) / "README.md", compact_only=compact_only)
        commit = publish(
            files,
            api,
            repo_id,
            delete=(*STALE_PATTERNS, *_DENSE_PATTERNS) if compact_only else STALE_PATTERNS,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    return commit.pr_url or commit.commit_url


def _connect(repo_id: str, token: str | None) -> tuple[HfApi, str]:
    """A client, and the full id of a repository that is named without its user."""
    token = token or get_token()
    if not token:
        raise ModelError(f"pushing to {repo_id!r} needs a Hub token: {LOGIN_HINT}")
    api = HfApi(token=token)
    try:
        return api, repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    except Exception as error:  # see `publish`
        raise explain_hub_error(error, repo_id) from None


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file() or not (has_weights(folder) or has_weights(folder / COMPACT_FOLDER)):
        raise ModelError(f"folder {str(folder)!r} has no model to push: it needs config.json and model.safetensors")


def _compact_form(folder: Path, target: Path, values_dtype: torch.dtype | None) -> dict[str, Path]:
    """The files of a compact form of the folder, written to `target`, if there is one and it is worth it."""
    if not has_weights(folder):
        raise ModelError("values_dtype: this folder has no dense weights to make another compact form of")
    try:
        if not write_compact_folder(folder, target, values_dtype=values_dtype):
            return {}
    except ValueError as error:
        raise ModelError(f"folder {str(folder)!r} cannot be stored compactly: {error}") from error
    return {f"{COMPACT_FOLDER}/{path.name}": path for path in target.iterdir()}


def _card(files: dict[str, Path], repo_id: str, target: Path, *, compact_only: bool) -> dict[str, Path]:
    """The card with the repository's id in its examples, if the folder was saved before that was known, and with the
    ways of loading that the pushed files allow."""
    if "README.md" not in files:
        return {}
    saved = files["README.md"].read_text(encoding="utf-8")
    text = saved.replace(UNKNOWN_ID, repo_id)
    if compact_only:
        text = without_dense_weights(text)
    if text == saved:
        return {}
    target.write_text(text, encoding="utf-8")
    return {"README.md": target}


def _matches(place: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(place, pattern) for pattern in patterns)
