"""Where results go, looked at before anything is measured: half an hour later would be too late."""

from pathlib import Path


def check(option: str, path: Path) -> None:
    """See that a file can be written; what is in it stays, and one that was not there is not there afterwards.

    Args:
        option: Who asked for it.
        path: The file.

    Raises:
        ValueError: It cannot; says why, and what to do.
    """
    there = path.exists()
    try:
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise ValueError(
            f"{option}: {path} cannot be written ({error.strerror}): "
            "name a place that you may write to, in a folder that is there"
        ) from error


def check_folder(option: str, folder: Path, names: tuple[str, ...]) -> None:
    """See that files of these names can be written into a folder, which is made.

    Raises:
        ValueError: They cannot; says why, and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{option}: there can be no folder {folder} ({error.strerror}): name one where you may write"
        ) from error
    for name in names:
        check(option, folder / name)
