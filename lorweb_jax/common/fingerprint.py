"""Short hashes that tell one model's files, one image or one caption from another."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lorweb_jax.common.errors import UserError

_READ_WHOLE = (".json", ".txt", ".model")  # configs, vocabularies, tokenizers
_BLOCKS, _BLOCK = 256, 4096  # what is read of a large weight file: this many blocks of this many bytes
_SMALL = 2**24  # bytes of a weight file that is read whole


def of_folder(folder: str | Path) -> str:
    """Of a model's or tokenizer's folder, independent of its path: configs, tokenizers and small weight files whole; of
    large ones the size, the beginning (names and shapes) and blocks spread over the rest, which another training
    changes.

    Raises UserError if the folder can't be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(Path(folder).iterdir()):
            if file.suffix in _READ_WHOLE or file.suffix == ".safetensors" and file.stat().st_size <= _SMALL:
                digest.update(f"{file.name}\0".encode() + file.read_bytes())
            elif file.suffix == ".safetensors":
                digest.update(f"{file.name}\0".encode() + _blocks(file))
    except OSError as error:
        raise UserError(f"{folder} can't be read ({error.strerror}); check the path and its permissions") from None
    return digest.hexdigest()[:16]


def of_folders(folders: Iterable[str | Path]) -> str:
    """Of several folders in this order."""
    return hashlib.sha256(" ".join(map(of_folder, folders)).encode()).hexdigest()[:16]


def _blocks(file: Path) -> bytes:
    size = file.stat().st_size
    starts = sorted({int(start) // _BLOCK * _BLOCK for start in np.linspace(0, size, _BLOCKS, endpoint=False)})
    with open(file, "rb") as stream:
        parts = [str(size).encode()]
        for start in starts:
            stream.seek(start)
            parts.append(stream.read(_BLOCK))
    return b"\0".join(parts)


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def of_image(image: np.ndarray) -> str:
    """Of the pixels, uint8 [h, w, 3]; about a millisecond a megabyte."""
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]
