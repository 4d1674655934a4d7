"""Pack the drawings and photographs that the small base is trained on into one file (about 20 MB), read by load_sets.

They come from published packages, fetched beforehand into one folder:

  mkdir -p local_data/packages && cd local_data/packages
  npm pack openmoji@17.0.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
  pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1
  cd ../.. && python tools/pack_drawings.py --packages local_data/packages --out local_data/drawings64.npz

Taken are the code points that all sets have, one skin tone of each figure and every third flag of a country.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402
from lorweb_jax.data.embedded.drawing_sets import FORMAT, SETS  # noqa: E402
from lorweb_jax.data.embedded.drawings import is_held_out, plain_code, render, sign_name  # noqa: E402
from lorweb_jax.images.io import write_file  # noqa: E402

# set -> (package as npm pack or pip download names it, folder in it, ending, licence)
SOURCES = {
    "openmoji": ("openmoji-17.*.tgz", "package/color/svg/", ".svg", "CC BY-SA 4.0, OpenMoji, https://openmoji.org"),
    "lines": ("openmoji-17.*.tgz", "package/black/svg/", ".svg", "CC BY-SA 4.0, OpenMoji, https://openmoji.org"),
    "noto": ("emoji-datasource-google-*.tgz", "package/img/google/64/", ".png", "Apache-2.0, Noto Emoji, Google"),
    "twemoji": (
        "emoji-datasource-twitter-*.tgz",
        "package/img/twitter/64/",
        ".png",
        "CC BY 4.0, Twemoji, Twitter and other contributors",
    ),
    "fluent": ("lobehub-fluent-emoji-3d-*.tgz", "package/assets/", ".webp", "MIT, Fluent Emoji, Microsoft"),
}
# picture -> (package, file, what it shows, licence as its package states it)
_SCIKIT_IMAGE, _SCIKIT_LEARN = "scikit_image-*.whl", "scikit_learn-*.whl"
PHOTOGRAPHS = {
    "astronaut": (_SCIKIT_IMAGE, "skimage/data/astronaut.png", "astronaut", "public domain, NASA"),
    "brick": (_SCIKIT_IMAGE, "skimage/data/brick.png", "brick wall", "CC0"),
    "camera": (_SCIKIT_IMAGE, "skimage/data/camera.png", "man with a camera", "CC0, Lav Varshney"),
    "cat": (_SCIKIT_IMAGE, "skimage/data/chelsea.png", "cat", "CC0, Stefan van der Walt"),
    "clock": (_SCIKIT_IMAGE, "skimage/data/clock_motion.png", "moving clock", "public domain, Stefan van der Walt"),
    "coffee": (_SCIKIT_IMAGE, "skimage/data/coffee.png", "cup of coffee", "CC0, Rachel Michetti"),
    "coins": (_SCIKIT_IMAGE, "skimage/data/coins.png", "coins", "no known copyright restrictions"),
    "grass": (_SCIKIT_IMAGE, "skimage/data/grass.png", "lawn", "CC0"),
    "gravel": (_SCIKIT_IMAGE, "skimage/data/gravel.png", "gravel road", "CC0"),
    "galaxies": (_SCIKIT_IMAGE, "skimage/data/hubble_deep_field.jpg", "night sky", "public domain, NASA"),
    "retina": (_SCIKIT_IMAGE, "skimage/data/retina.jpg", "retina", "CC0"),
    "rocket": (_SCIKIT_IMAGE, "skimage/data/rocket.jpg", "rocket", "public domain, SpaceX"),
    "temple": (_SCIKIT_LEARN, "sklearn/datasets/images/china.jpg", "chinese temple", "CC BY 2.0, danielbuechele"),
    "flower": (_SCIKIT_LEARN, "sklearn/datasets/images/flower.jpg", "flower", "CC BY 2.0, vultilion"),
}
PARTS_OF_A_PHOTOGRAPH = 24
# Grey levels of a colour: 64 are no more seen than 256, and take two thirds of the space.
LEVELS = 64
MOST_WORDS = 7
TONE = re.compile("1F3F[B-F]")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--packages", type=nonempty_path, default=Path("local_data/packages"), help="where the packages lie"
    )
    parser.add_argument(
        "--out", type=nonempty_path, default=Path("local_data/drawings64.npz"), help="the file to write"
    )
    parser.add_argument("--size", type=int, default=64, help="side of a drawing, pixels (default: 64)")
    args = parser.parse_args(arguments)
    names = {name: read_package(args.packages, *source[:3]) for name, source in SOURCES.items()}
    table = signs(args.packages)
    common = sorted(set.intersection(set(table), *map(set, names.values())), key=lambda code: table[code]["order"])
    rows, files = [], []
    for code in thinned(common, table):
        images = {name: drawn(files_of[code], SOURCES[name][2], args.size) for name, files_of in names.items()}
        if min((image[..., 3] > 127).mean() for name, image in images.items() if name != "lines") < 0.06:
            continue  # thin signs vanish at small sizes
        for name, image in images.items():
            rows.append(table[code]["row"] | {"set": name, "code": code, "held_out": is_held_out(sign_name(code))})
            files.append(encoded(image, lossless=True))
        if sys.stderr.isatty() and len(rows) % 500 == 0:
            print(f"\r{len(rows)} drawings", end="", file=sys.stderr, flush=True)
    for code, (package, path, name, _) in PHOTOGRAPHS.items():
        for image in parts(open_photograph(args.packages, package, path), args.size):
            rows.append(
                {
                    "name": name,
                    "group": "photographs",
                    "subgroup": "photograph",
                    "set": "photograph",
                    "code": code,
                    "held_out": is_held_out(code),
                }
            )
            files.append(encoded(image, lossless=False))
    licences = {name: source[3] for name, source in SOURCES.items()} | {
        f"photograph {code}": source[3] for code, source in PHOTOGRAPHS.items()
    }
    index = json.dumps({"format": FORMAT, "size": args.size, "licences": licences, "drawings": rows})
    packed = io.BytesIO()
    np.savez(
        packed,
        index=np.frombuffer(index.encode(), np.uint8),
        ends=np.cumsum([len(file) for file in files]),
        data=np.frombuffer(b"".join(files), np.uint8),
    )
    write_file(args.out, packed.getvalue())
    print(f"\rwrote {args.out}: {len(packed.getvalue()) / 1e6:.1f} MB")
    for name in SETS:
        chosen = [i for i, row in enumerate(rows) if row["set"] == name]
        held_out = sum(rows[i]["held_out"] for i in chosen)
        print(f"  {name}: {len(chosen)}, held out {held_out}, {sum(len(files[i]) for i in chosen) / 1e6:.1f} MB")


def package_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"there is no {pattern} in {folder}; fetch the packages as --help says")
    return found[-1]


def read_package(folder: Path, pattern: str, inside: str, ending: str) -> dict[str, bytes]:
    """{code: file's bytes} of all files of the package's folder `inside`."""
    found = {}
    with tarfile.open(package_file(folder, pattern)) as archive:
        for member in archive:
            if member.name.startswith(inside) and member.name.endswith(ending):
                found[plain_code(member.name[len(inside) : -len(ending)])] = archive.extractfile(member).read()
    return found


def signs(folder: Path) -> dict[str, dict]:
    """{code: its place in order and what a drawing's row says of it}: OpenMoji's table, without what has no name."""
    with tarfile.open(package_file(folder, "openmoji-17.*.tgz")) as archive:
        table = json.loads(archive.extractfile("package/data/openmoji.json").read())
    found = {}
    for entry in table:
        name = plain_name(entry["annotation"])
        if name and len(name.split()) <= MOST_WORDS and "keycap" not in name and entry["group"] != "component":
            found[plain_code(entry["hexcode"])] = {
                "order": entry["order"] or 0,
                "row": {"name": name, "group": entry["group"], "subgroup": entry["subgroups"]},
            }
    return found


def plain_name(annotation: str) -> str:
    """Lower-case words of letters alone: "flag: Côte d’Ivoire" -> "flag of cote divoire"."""
    name = unicodedata.normalize("NFKD", annotation.lower()).encode("ascii", "ignore").decode()
    name = name.replace("flag: ", "flag of ").replace("-", " ").replace("&", " and ").replace("skin tone", "skin")
    return " ".join(re.sub("[^a-z ]", "", name).split())


def thinned(codes: list[str], table: dict[str, dict]) -> list[str]:
    """One skin tone of each figure, by hash, beside the figure without one; every third flag of a country; no name
    twice."""
    toned, kept, names = {}, [], set()
    for code in codes:
        if len(TONE.findall(code)) == 1:
            toned.setdefault(TONE.sub("", code), []).append(code)
    one_tone = {family[hashed(base) % len(family)] for base, family in toned.items()}
    for code in codes:
        row = table[code]["row"]
        if TONE.search(code) and code not in one_tone or row["name"] in names:
            continue
        if row["subgroup"] == "country-flag" and hashed(code) % 3:
            continue
        names.add(row["name"])
        kept.append(code)
    return kept


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"thinned {text}".encode()).digest()[:4], "big")


def drawn(data: bytes, ending: str, size: int) -> np.ndarray:
    """A drawing's file as uint8 [size, size, 4], larger ones averaged by opacity."""
    if ending == ".svg":
        return render(data.decode(), size)
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGBA")
    if image.size != (size, size):
        image = image.convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")
    return np.asarray(image)


def open_photograph(folder: Path, package: str, path: str) -> Image.Image:
    with zipfile.ZipFile(package_file(folder, package)) as archive, archive.open(path) as file:
        return Image.open(io.BytesIO(file.read())).convert("RGB")


def parts(image: Image.Image, size: int) -> list[np.ndarray]:
    """Squares of a photograph, from a third of its shorter side to all of it, at the same places every time."""
    random, found = np.random.default_rng(image.size), []
    for _ in range(PARTS_OF_A_PHOTOGRAPH):
        side = round(min(image.size) * random.uniform(0.35, 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        found.append(np.asarray(square.convert("RGBA")))
    return found


def encoded(image: np.ndarray, lossless: bool) -> bytes:
    """WebP: a drawing without loss beyond its LEVELS, a photograph as small as can hardly be seen."""
    packed = io.BytesIO()
    if lossless:
        colour = np.round(np.round(image[..., :3] / 255 * (LEVELS - 1)) / (LEVELS - 1) * 255).astype(np.uint8)
        Image.fromarray(np.concatenate([colour, image[..., 3:]], -1)).save(
            packed, "WEBP", lossless=True, method=4, quality=100
        )
    else:
        Image.fromarray(image[..., :3]).save(packed, "WEBP", quality=92, method=6)
    return packed.getvalue()


if __name__ == "__main__":
    run_command(main)
