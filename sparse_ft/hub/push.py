"""Sparse checkpoints to the Hugging Face Hub."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from torch import nn

from .errors import LOGIN_HINT, ModelError, explain_hub_error
from .save import STALE_PATTERNS, save_pretrained
from .source import WEIGHT_FILES

# Checkpoints to resume from, scratch files, and pickles (training_args.bin may hold a token).
NOT_UPLOADED = ("checkpoint-*", "_*", "*/_*", "*.bin", "*.pt", "*.pth", "*.pkl", ".cache/*", ".git/*")


def push_to_hub(
    model_or_dir: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload sparse model",
    **save_options: Any,
) -> str:
    """Upload a model, or a folder that `save_pretrained` or a training run wrote, in one commit.

    The repository is made if it does not exist. From a folder, ``checkpoint-*``, names that start with ``_`` and
    pickles stay behind. Files of an earlier upload that would contradict this one are deleted.

    Args:
        model_or_dir: A model as `save_pretrained` takes it, or a folder.
        repo_id: ``USER/NAME``, or ``NAME`` for the user of the token.
        private: For a new repository; None takes the account's default.
        revision: Branch to upload to, made if it does not exist; None is the main branch.
        create_pr: Open a pull request against the main branch instead of committing to it.
        token: Hub token with the write permission; None uses the one of the login.
        commit_message: First line of the commit.
        **save_options: For a model: options of `save_pretrained`, such as `metrics` or `card`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ModelError: The folder has no model, there is no token, or the Hub refuses; one line says what to do.
    """
    if create_pr and revision is not None:
        raise ModelError("give revision or create_pr, not both: a pull request is against the main branch")
    if isinstance(model_or_dir, nn.Module):
        api, repo_id = _connect(repo_id, token)
        save_options["card"] = {"model_id": repo_id, **(save_options.get("card") or {})}
        with tempfile.TemporaryDirectory() as temporary:
            save_pretrained(model_or_dir, temporary, **save_options)
            return _upload(Path(temporary), api, repo_id, private, revision, create_pr, commit_message)
    if save_options:
        raise ModelError(f"{', '.join(save_options)}: only for a model; a folder is uploaded as it is")
    folder = Path(model_or_dir).expanduser()
    if not (folder / "config.json").is_file() or not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise ModelError(f"folder {str(folder)!r} has no model to push: it needs config.json and model.safetensors")
    api, repo_id = _connect(repo_id, token)
    return _upload(folder, api, repo_id, private, revision, create_pr, commit_message)


def _connect(repo_id: str, token: str | None) -> tuple[HfApi, str]:
    """A client, and the full id of a repository that is named without its user."""
    token = token or get_token()
    if not token:
        raise ModelError(f"pushing to {repo_id!r} needs a Hub token: {LOGIN_HINT}")
    api = HfApi(token=token)
    try:
        return api, repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    except Exception as error:  # see _upload
        raise explain_hub_error(error, repo_id) from None


def _upload(
    folder: Path,
    api: HfApi,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> str:
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=list(NOT_UPLOADED),
            delete_patterns=list(STALE_PATTERNS),
        )
    except Exception as error:  # whatever the client and the transport below it raise
        # The cause is left out of the traceback: a transport error may quote the request's headers, token included.
        raise explain_hub_error(error, repo_id, revision=revision) from None
    return commit.pr_url or commit.commit_url
