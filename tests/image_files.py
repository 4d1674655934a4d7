"""Image files of every kind, written by hand from the formats' specifications (no PIL), and ICC profiles."""

import struct
import zlib

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
# Linear sRGB, and ProPhoto RGB, to XYZ at D50: http://www.brucelindbloom.com, "RGB/XYZ matrices", Bradford-adapted.
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
PROPHOTO = np.array([[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857], [0.0, 0.0, 0.8252100]])


def encode(linear):
    """Linear light 0..1 -> sRGB 0..1 (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def packed(samples, depth):
    """Samples [H, W, C] as rows of bytes, most significant bit first, rows on whole bytes."""
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in samples]
    bits = (samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]


def png(colour, depth, samples, *, palette=None, trns=None, icc=None):
    """A PNG of `colour` type (0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA) of integer samples [H, W, C]."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [chunk(b"iCCP", b"p\0\0" + zlib.compress(icc))] if icc is not None else []
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", trns)] if trns else []
    data = b"".join(b"\0" + row for row in packed(samples, depth))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(samples, depth, photometric, order="<", deflated=False):
    """A TIFF of one strip, of integer samples [H, W, C]; depth 8, 12 or 16."""
    height, width, channels = samples.shape
    if depth == 12:
        data = b"".join(packed(samples, 12))
    else:
        data = samples.astype(f"{order}u{depth // 8}").tobytes()
    data = zlib.compress(data) if deflated else data
    depths = struct.pack(f"{order}{channels}H", *[depth] * channels)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, None),
        (259, 3, 1, 8 if deflated else 1),
        (262, 3, 1, photometric),
        (273, 4, 1, None),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    after = 8 + 2 + 12 * len(tags) + 4
    ifd = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        value = after if tag == 258 else after + len(depths) if tag == 273 else value
        inline = struct.pack(f"{order}I", value)
        if tag == 258 and channels <= 2:
            inline = depths.ljust(4, b"\0")
        elif kind == 3 and tag != 258:
            inline = struct.pack(f"{order}HH", value, 0)
        ifd += struct.pack(f"{order}HHI", tag, kind, count) + inline
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return start + ifd + bytes(4) + depths + data


def profile(space, tags):
    """An ICC profile (version 2.4) of a display or printer with these tags."""
    tags = {
        b"wtpt": _xyz(D50),
        b"cprt": b"text\0\0\0\0none\0",
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        **tags,
    }
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag
    kind, pcs = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"none", 0x02400000, kind, space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(_fixed(value) for value in D50)
    return head.ljust(128, b"\0") + table + data


def rgb_profile(matrix, gamma):
    """Of a display with these primaries (columns, XYZ at D50) and this gamma."""
    return profile(
        b"RGB ",
        {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T)}
        | {name: _curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")},
    )


def grey_profile(gamma):
    return profile(b"GRAY", {b"kTRC": _curve(gamma)})


def cmyk_profile(lab):
    """Of a printer whose 16 corners c, m, y, k in {0, 1} have the Lab colours lab [2, 2, 2, 2, 3]."""
    corners = np.stack([lab[..., 0] * 2.55, lab[..., 1] + 128, lab[..., 2] + 128], -1).round().astype(np.uint8)
    straight = bytes(range(256))
    matrix = b"".join(_fixed(value) for value in np.eye(3).ravel())
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * straight + corners.tobytes() + 3 * straight
    return profile(b"CMYK", {b"A2B0": table})


def lab_to_srgb(lab):
    """CIE Lab at D50 -> sRGB 0..1."""
    f = (lab[0] + 16) / 116
    f = np.array([f + lab[1] / 500, f, f - lab[2] / 200])
    xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return encode(np.linalg.inv(SRGB) @ xyz)


def _fixed(value):
    return struct.pack(">i", round(value * 65536))


def _xyz(value):
    return b"XYZ " + bytes(4) + b"".join(_fixed(v) for v in value)


def _curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
