"""Hub names and the Hub's cache in the place of folders; nothing here asks the Hub."""

from pathlib import Path

import huggingface_hub
import pytest
from golden import golden_dir
from huggingface_hub import constants, errors

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.hub_cache import ENCODER_FILES, PIPELINE_FILES, existing, is_name, resolve
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.models.image_encoder.encoder import open_image_encoder
from lorweb_jax.pipeline.adapters import load_basis
from lorweb_jax.pipeline.folder import PARTS, PipelineFolder

NAME = "some-lab/FLUX.1-Kontext-dev"
PIPELINE = golden_dir() / "tiny_pipeline"


def cached(root: Path, source: Path, name: str = NAME, commit: str = "a" * 40) -> Path:
    """A model as the Hub's cache keeps it: models--org--name with refs/main and snapshots of links."""
    folder = root / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for file in source.rglob("*") if source.is_dir() else [source]:
        if file.is_file():
            link = snapshot / (file.relative_to(source) if source.is_dir() else file.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache that huggingface_hub uses, in an empty working directory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def test_root_of_a_cache(cache, capsys):
    """Its snapshot is taken and said: refs/main's, or the only one; given by any of its levels."""
    folder = cached(cache, PIPELINE)
    assert PipelineFolder(folder).folder == folder / "snapshots" / ("a" * 40)
    assert "taking its snapshot aaaa" in capsys.readouterr().out
    assert resolve(folder / "snapshots", (), "") == folder / "snapshots" / ("a" * 40)
    cached(cache, PIPELINE, commit="b" * 40)
    assert resolve(folder, (), "").name == "b" * 40
    (folder / "refs" / "main").write_text("../../../etc")
    with pytest.raises(UserError, match=f"snapshots {'a' * 40}, {'b' * 40} and no refs/main"):
        resolve(folder, (), "")
    with pytest.raises(UserError, match="cache of several models .models--some-lab--FLUX.1-Kontext-dev"):
        PipelineFolder(cache)


def test_names_in_the_cache(cache, capsys):
    """Pipeline, image encoder and basis by their names, from the cache alone."""
    cached(cache, PIPELINE)
    cached(cache, PIPELINE / "clip_vision", "some-lab/clip")
    cached(cache, golden_dir() / "basis_a.safetensors", "some-lab/basis")
    folder = PipelineFolder(NAME, "some-lab/clip")
    assert folder.folder.parent.parent.parent == cache
    assert "some-lab/clip: taking the cached snapshot" in capsys.readouterr().out
    assert open_image_encoder("some-lab/clip").processor == folder.encoder.processor
    assert load_basis("some-lab/basis", backbone(folder.flux_config).adapted)[0].size == 8


def test_what_is_not_there(cache, monkeypatch):
    """Offline the command that fetches it is told; a missing path that can't be a name stays a missing path."""
    with pytest.raises(
        UserError,
        match=rf"{NAME} looks like a Hub name and is not here, and HF_HUB_OFFLINE is set; "
        rf"fetch it with `python -c .*get.'{NAME}', allow_patterns=.'model_index.json'",
    ):
        PipelineFolder(NAME)
    cached(cache, PIPELINE / "vae")
    with pytest.raises(UserError, match="is not whole in the Hub's cache"):
        PipelineFolder(NAME)
    Path("runs").mkdir()
    for missing in ("runs/basis", "/no/such", "./a/b", "a/b/c", "a/b.safetensors", "../x/y", "a--b/c"):
        assert not is_name(missing)
        with pytest.raises(UserError, match=f"there is no {Path(missing)}; give it"):
            existing(missing, (), "it")
    with pytest.raises(UserError, match="on the Hub it is openai/clip-vit-large-patch14"):
        open_image_encoder("clip-vit-large-patch14")


@pytest.mark.parametrize(
    "error,message",
    [
        (errors.GatedRepoError, "accepted its licence"),
        (errors.RepositoryNotFoundError, "no repository of this name"),
        (ConnectionError, "couldn't be asked .ConnectionError.*fetch it with `python -c"),
    ],
)
def test_fetching(error, message, cache, monkeypatch):
    """A name is fetched where the Hub may be asked, only the files that are needed; what goes wrong is a sentence."""
    asked = []

    def download(name, allow_patterns, local_files_only=False):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        asked.append((name, allow_patterns))
        if len(asked) > 1:
            raise error("no") if error is ConnectionError else error("no", response=_Response())
        return str(cached(cache, PIPELINE / "clip_vision", name) / "snapshots" / ("a" * 40))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert open_image_encoder("some-lab/clip").processor.crop == (32, 32)
    assert asked == [("some-lab/clip", list(ENCODER_FILES))]
    with pytest.raises(UserError, match=message):
        resolve(NAME, PIPELINE_FILES, "it", PARTS)


class _Response:
    headers, status_code, request, url = {}, 403, None, ""
