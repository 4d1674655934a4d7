"""Folders of models by path, by a Hub cache's root, or by a Hub name such as black-forest-labs/FLUX.1-Kontext-dev."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lorweb_jax.common.errors import UserError, say

# What is downloaded of a repository; the rest (other formats, single files beside the folders) is not.
PIPELINE_FILES = (
    "model_index.json",
    *(
        f"{part}/*"
        for part in (
            "transformer",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "scheduler",
            "clip_vision",
        )
    ),
)
ENCODER_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
BASIS_FILES = ("*.safetensors", "config.yaml", "adapter_config.json")

# Organisation and name: of these characters, without the dots and slashes of a path.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_ENDINGS = (".safetensors", ".gguf", ".yaml", ".json", ".py")
# Folders that are called like a model on the Hub.
_KNOWN = {
    "FLUX.1-Kontext-dev": "black-forest-labs/FLUX.1-Kontext-dev",
    "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "siglip2-base-patch16-224": "google/siglip2-base-patch16-224",
}


def is_name(path: str | Path) -> bool:
    """Whether it can only be a Hub name: no such path exists, nor its parent."""
    text = str(path)
    return (
        _NAME.fullmatch(text) is not None
        and not text.endswith(_ENDINGS)
        and "--" not in text
        and ".." not in text
        and not Path(text).exists()
        and not Path(text).parent.exists()
    )


def resolve(path: str | Path, files: Sequence[str], what: str, needed: Sequence[str] = ()) -> Path:
    """The local path of a model: `path` itself; the snapshot in a model's folder of the Hub's cache; for a Hub name the
    cached snapshot, downloaded if there is none and HF_HUB_OFFLINE is not set.

    files: patterns of what is downloaded. what: for messages, such as "a pipeline's folder". needed: files or folders
    without which a cached snapshot isn't complete. Prints which snapshot is taken. Raises UserError for a name that
    can't be downloaded, with the command that does it, and for a cache without a snapshot; not for a missing path.
    """
    if is_name(path):
        return _by_name(str(path), files, what, needed)
    path = Path(path).expanduser()
    return _within_cache(path) if path.is_dir() else path


def existing(path: str | Path, files: Sequence[str], what: str, needed: Sequence[str] = ()) -> Path:
    """`resolve`, and UserError where nothing lies there."""
    folder = resolve(path, files, what, needed)
    if not folder.exists():
        known = _KNOWN.get(folder.name)
        hint = f"; on the Hub it is {known}, a name that is taken too" if known else ""
        raise UserError(f"there is no {folder}; give {what}{hint}")
    return folder


def _within_cache(path: Path) -> Path:
    """The snapshot of a folder as the Hub's cache keeps a model; any other folder as it is."""
    if several := sorted(folder.name for folder in path.glob("models--*") if folder.is_dir()):
        raise UserError(
            f"{path} is a Hub cache of several models ({', '.join(several[:5])}); give one of these folders"
        )
    root = path.parent if path.name == "snapshots" else path
    if not (root / "snapshots").is_dir() or not (root.name.startswith("models--") or (root / "refs").is_dir()):
        return path
    snapshots = sorted(folder for folder in (root / "snapshots").iterdir() if folder.is_dir())
    main = root / "refs" / "main"
    name = main.read_bytes().strip() if main.is_file() and main.stat().st_size < 200 else b""
    named = next((folder for folder in snapshots if os.fsencode(folder.name) == name), None)
    if named is None:
        if len(snapshots) != 1:
            names = ", ".join(folder.name for folder in snapshots) or "none"
            raise UserError(
                f"{path} is a Hub cache's folder with the snapshots {names} and no refs/main that names "
                "one; give the path of one of them"
            )
        named = snapshots[0]
    say(f"{path}: taking its snapshot {named.name}")
    return named


def _by_name(name: str, files: Sequence[str], what: str, needed: Sequence[str]) -> Path:
    import huggingface_hub  # slow to import
    from huggingface_hub import constants, errors

    # Versions of `hf download` differ in how several patterns are given.
    command = (
        f'python -c "from huggingface_hub import snapshot_download as get; get({name!r}, allow_patterns={list(files)})"'
    )
    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files), local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        cached = None
    if cached is not None and all((cached / part).exists() for part in needed):
        say(f"{name}: taking the cached snapshot {cached}")
        return cached
    state = "is not here" if cached is None else "is not whole in the Hub's cache"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name} looks like a Hub name and {state}, and HF_HUB_OFFLINE is set; fetch it with "
            f"`{command}`, or give {what}"
        )
    say(f"{name} {state}: fetching it from the Hub")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is given only to those who accepted its licence: do so on its page on the Hub, then "
            "log in with `hf auth login` and give the command again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no {name} here, and the Hub has no repository of this name (or it is private: "
            f"`hf auth login`); give {what}"
        ) from None
    except Exception as error:  # every kind of network and disk error, of several libraries
        raise UserError(
            f"{name} {state}, and the Hub couldn't be asked ({_in_a_line(error.__cause__ or error)}); "
            f"fetch it with `{command}`, or give {what}"
        ) from None


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
