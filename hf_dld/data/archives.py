"""Archives of a local corpus, looked at before `datasets` unpacks them: a few bytes may stand for any number."""

import tarfile
import zipfile
from pathlib import Path

from .audio import MAX_FILE_BYTES

MAX_UNPACKED_RATIO = 100
"""How many times its own size a ZIP archive may unpack to. Speech gives less than 10."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


def check_archives(folder: Path) -> None:
    """Look at the tables of contents of the .zip and .tar files of a folder; nothing is unpacked.

    Raises:
        ValueError: an archive that cannot be read, that unpacks to more than `MAX_UNPACKED_RATIO` times its size, a
            file in one of more than `MAX_FILE_BYTES`, or compression within a TAR file, which hides how much it is.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix.lower() == ".zip":
                _check_zip(path)
            elif path.suffix.lower() == ".tar":
                _check_tar(path)
        except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
            raise ValueError(
                f"{path} is not a whole, uncompressed {path.suffix[1:].upper()} archive: {error}"
            ) from None


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_UNPACKED_RATIO * path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes and would unpack to {unpacked:,}; at most "
            f"{MAX_UNPACKED_RATIO} times its size is unpacked"
        )


def _check_tar(path: Path) -> None:
    with tarfile.open(path, "r:") as archive:  # not compressed as a whole
        for member in archive:
            if member.size > MAX_FILE_BYTES or member.issparse() or member.name.lower().endswith(_COMPRESSED):
                raise ValueError(
                    f"{path}: {member.name} is compressed, sparse or larger than {MAX_FILE_BYTES:,} bytes, and a TAR "
                    "archive is read into memory file by file"
                )
