"""Write a folder of files so that a failure half-way leaves the files that were there before."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A temporary folder inside `directory`; what is written there moves into place when the block ends well.

    Every file replaces its namesake in one step (`os.replace`); files of other names stay. If the block raises,
    `directory` is as it was. The temporary folder lies inside, not beside, because `directory` may be the root of a
    mounted volume; its name starts with an underscore, so that an upload of the folder leaves it out.

    Raises:
        OSError: The disk is full or the place cannot be written to; the message names `directory` and says that
            its files are untouched.
    """
    directory = Path(directory).resolve()
    stage = None
    created = not directory.exists()
    try:
        if not created and not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"cannot save to {directory}: it is a file, not a folder")
        directory.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix="_saving-", dir=directory))
        yield stage
        mode = _usual_mode(stage)
        for source in sorted(path for path in stage.rglob("*") if path.is_file()):
            target = directory / source.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.chmod(mode)  # safetensors 0.8 makes files that only their owner can read
            os.replace(source, target)
    except SafetensorError as error:
        # safetensors reports a failed write in its own type, with the system's error number in the text.
        if f"os error {errno.ENOSPC})" in str(error):
            raise _disk_full(directory) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(directory) from error
        raise
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        if created and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _usual_mode(folder: Path) -> int:
    """Permissions of a new file under the user's umask, which can only be read by making one."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _disk_full(directory: Path) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"no space left on the disk of {directory}: nothing was saved, files that were there are untouched; "
        "free some space and save again",
    )
