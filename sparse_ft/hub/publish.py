"""A folder to the Hub in one commit: all of its files, or none."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import CommitInfo

from .errors import ModelError, explain_hub_error
from .retry import retrying

# Checkpoints to resume from, scratch files, and pickles (training_args.bin may hold a token).
NOT_UPLOADED = ("checkpoint-*", "_*", "*/_*", "*.bin", "*.pt", "*.pth", "*.pkl", ".cache/*", ".git/*")
_TEXTS = {".md", ".json", ".yaml", ".yml", ".html", ".txt", ".jinja", ".csv"}
_LARGEST_TEXT = 32 * 2**20
_SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def files_to_publish(folder: Path, ignore: Sequence[str] = NOT_UPLOADED) -> dict[str, Path]:
    """The files of a folder by their place in the repository, without those that match `ignore`.

    Raises:
        ModelError: A link leads out of the folder, to a file that nobody asked to publish.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if not path.is_file() or any(fnmatch(place, pattern) for pattern in ignore):
            continue
        target = path.resolve()
        if path.is_symlink() and not ({folder.resolve(), *_caches(folder)} & set(target.parents)):
            raise ModelError(f"{path} is a link to {target}, outside the folder: copy the file, or remove the link")
        files[place] = path
    return files


def _caches(folder: Path) -> set[Path]:
    """Where the Hub's own cache keeps the files that its snapshot folders link to."""
    snapshots = folder.resolve().parent
    return {snapshots.parent / "blobs"} if snapshots.name == "snapshots" else set()


def check_secrets(files: dict[str, Path], token: str) -> None:
    """Make sure that no text among the files holds a Hub token.

    Raises:
        ModelError: One does; the message names the file, and not the token.
    """
    for place, path in files.items():
        if path.suffix in _TEXTS and path.stat().st_size <= _LARGEST_TEXT:
            content = path.read_bytes()
            if token.encode() in content or _SECRET.search(content):
                raise ModelError(f"{path} holds a Hub token, so nothing was published: remove it from {place} first")


def publish(
    files: dict[str, Path],
    api: HfApi,
    repo_id: str,
    *,
    delete: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
) -> CommitInfo:
    """Upload files and commit them, on top of the very state of the repository that was looked at.

    The commit is refused, and everything looked at again, if somebody else has committed meanwhile: what is published
    is never a mixture of two models.

    Args:
        files: Local file by place in the repository, which is made if it does not exist.
        delete: Patterns of files to delete, unless they are among `files`.
        private, revision, create_pr, commit_message: See `push_to_hub`.

    Raises:
        ModelError: The Hub refuses, or fails for longer than `retrying` bears; one line says what to do.
    """
    check_secrets(files, str(api.token))

    def attempt() -> CommitInfo:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        state = api.model_info(repo_id, revision=revision)
        present = [each.rfilename for each in state.siblings or ()]
        stale = [name for name in present if name not in files and any(fnmatch(name, each) for each in delete)]
        return api.create_commit(
            repo_id,
            # Made anew for each attempt: an operation remembers what the Hub had of its file.
            [CommitOperationAdd(place, str(path)) for place, path in files.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=state.sha,
        )

    try:
        return retrying(attempt)
    except Exception as error:  # whatever the client and the transport below it raise
        # The cause is left out of the traceback: a transport error may quote the request's headers, token included.
        raise explain_hub_error(error, repo_id, revision=revision, publishing=True) from None
