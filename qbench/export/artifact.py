"""What a run left on disk, by content."""

import hashlib
from pathlib import Path

from qbench.store.records import Artifact


def describe(folder: Path, kind: str = "hf") -> Artifact:
    """The folder as a database record: digest over its files' names and contents, and its size."""
    digest, size = hashlib.sha256(), 0
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            digest.update(f"{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        size += path.stat().st_size
    return Artifact(kind=kind, path=str(folder.resolve()), sha256=digest.hexdigest(), bytes=size)
