"""HTML pages that ask nothing of the network: style, tables, embedded pictures; svg.py draws their figures."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from lorweb_jax.images.grid import within

SHOWN = 160  # px of an embedded picture's longer edge

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#5b6570;--line:#d5dae0;--panel:#f5f7f9;--ink:#1f5fbf}
@media (prefers-color-scheme:dark){:root{--back:#14171a;--text:#e6e9ec;--soft:#9aa5b0;--line:#363d45;--panel:#1d2226;
--ink:#7fb0ff}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:90rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.25rem;margin:2rem 0 .4rem;border-top:1px solid var(--line);
padding-top:1rem}h3{font-size:1.05rem;margin:1.2rem 0 .3rem}p,li{overflow-wrap:anywhere}
.soft,figcaption{color:var(--soft)}
.scroll{overflow-x:auto;margin:.5rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--back);white-space:normal;
min-width:7rem;max-width:14rem;overflow-wrap:anywhere}
@media(min-width:60rem){th:first-child,td:first-child{min-width:12rem}}
td small{display:block;color:var(--soft);font-weight:400}.best{font-weight:700}
.row{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.6rem;margin:.6rem 0;
overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(5.5rem,1fr));gap:.5rem;margin-top:.4rem}
figure{margin:0}.sheets{display:flex;flex-wrap:wrap;gap:1rem;align-items:start}.sheets figure{max-width:100%}
.sheets img{max-width:100%!important}code{overflow-wrap:anywhere}a{color:var(--ink)}
figure img{display:block;width:100%;height:auto;max-width:10rem;image-rendering:pixelated;border-radius:2px}
figcaption{font-size:.8rem;line-height:1.3;overflow-wrap:anywhere}
.figure{width:100%;max-width:34rem;height:auto;display:block}
.figure text{fill:var(--text);font:11px system-ui,sans-serif}
.grid{stroke:var(--line)}.whisker{stroke:currentColor;stroke-width:1.5}circle{fill:currentColor}
.figure .number{fill:var(--back);font-weight:700}.cell{fill:var(--ink)}
.m0{color:#1f77d0}.m1{color:#d1495b}.m2{color:#3a8f4d}.m3{color:#b07800}.m4{color:#8a56c2}.m5{color:#00868f}
.m6{color:#b0457f}.m7{color:#6b7480}.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.legend b{display:inline-block;min-width:1.4rem;padding-right:.3rem}summary{cursor:pointer;margin:.6rem 0}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The page as a text. parts: HTML of its body after the title; empty ones are left out."""
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *(part for part in parts if part)]) + "\n</body></html>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """head and the cells are HTML already."""
    top = "".join(f"<th>{x}</th>" for x in head)
    body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(image: np.ndarray, longest: int = SHOWN) -> str:
    """An img element with the picture uint8 [h, w, 3] in it, at most `longest` px, WebP or, where it is small, PNG."""
    image = within(image, longest)
    kind, options = ("png", {"optimize": True}) if max(image.shape[:2]) <= 64 else ("webp", {"quality": 80})
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" width="{image.shape[1]}" height="{image.shape[0]}" src="data:image/{kind};base64,{text}">'
