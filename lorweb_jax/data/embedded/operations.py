"""The image operations of the embedded data set: their names, their sentences and which tasks are held out.

An operation is one parameter of a family. `instruction` is the family's plain sentence, which leaves the parameter
open, so that only an example pair can tell it; `specific` says it all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lorweb_jax.data.embedded import effects
from lorweb_jax.data.embedded.drawing_sets import STYLE_WORDS, caption_words
from lorweb_jax.data.embedded.effects import COLOURS, on_white

__all__ = [
    "HELD_OUT_TASKS",
    "LAST_ONLY",
    "OPERATIONS",
    "STYLES",
    "TRAINING_TASKS",
    "Operation",
    "Style",
    "all_sentences",
    "composed",
    "on_white",
    "operation",
]


@dataclass(frozen=True)
class Style:
    """A set of drawings as the goal of an edit: the same code point in that set. Sentences as in Operation."""

    instruction: str
    specific: tuple[str, str]
    describe: str


@dataclass(frozen=True)
class Operation:
    """One image operation; `apply` maps RGBA uint8 [H,W,4] to RGB uint8 [H,W,3] of any size, deterministically."""

    family: str
    parameter: str
    instruction: str
    specific: tuple[str, str]
    describe: str
    apply: Callable[[np.ndarray], np.ndarray]

    @property
    def name(self) -> str:
        return f"{self.family}_{self.parameter}"

    @property
    def needs_shape(self) -> bool:
        """Whether it asks what is drawn and what is left free: without transparency, as of a photograph, it does
        nothing, or fills the picture."""
        return self.family in ("background", "backdrop", "silhouette", "outline", "shadow")


def _coloured(family, effect, colours, instruction, first, second, describe) -> list[Operation]:
    """One operation for each colour; {} in the sentences is the colour."""
    return [
        Operation(
            family,
            colour,
            instruction,
            (first.format(colour), second.format(colour)),
            describe.format(colour),
            partial(effect, colour=COLOURS[colour]),
        )
        for colour in colours.split()
    ]


def _family(family, instruction, *rows) -> list[Operation]:
    """Rows of parameter, two specific sentences, description, effect and the effect's arguments after the image."""
    return [
        Operation(
            family,
            parameter,
            instruction,
            (first, second),
            describe,
            lambda rgba, effect=effect, arguments=arguments: effect(rgba, *arguments),
        )
        for parameter, first, second, describe, effect, *arguments in rows
    ]


_BLUE, _GRAY, _RED, _BLACK, _WHITE = (COLOURS[name] for name in ("blue", "gray", "red", "black", "white"))

# fmt: off
_ALL = [
    *_coloured("tint", effects.tint, "red green blue yellow purple pink", "change its colour",
               "make it {}", "paint it {}", "in {} shades"),
    *_coloured("background", effects.on_colour, "yellow pink blue green orange purple", "change the background",
               "make the background {}", "put it on a {} background", "on a {} background"),
    *_family("backdrop", "put something behind it",
             ("sky", "put the sky behind it", "show it before a blue sky", "before the sky",
              effects.on_gradient, (90, 160, 250), (225, 240, 255)),
             ("sunset", "put an evening sky behind it", "show it before an orange sky", "before an evening sky",
              effects.on_gradient, (250, 120, 60), (255, 230, 150)),
             ("stripes", "put stripes behind it", "show it before green stripes", "before stripes",
              effects.on_pattern, (150, 215, 140), lambda x, y: x * 8 + 0 * y),
             ("checker", "put a checker pattern behind it", "show it before gray squares", "before a checker pattern",
              effects.on_pattern, (190, 190, 190), lambda x, y: np.floor(x * 8) + np.floor(y * 8))),
    *_coloured("frame", effects.frame, "red blue green black yellow purple", "put a frame around it",
               "put a {} frame around it", "add a {} border", "with a {} frame"),
    *_coloured("silhouette", effects.silhouette, "black red blue green", "turn it into a silhouette",
               "turn it into a {} silhouette", "fill its shape with {}", "as a {} silhouette"),
    *_coloured("outline", effects.outline, "red blue green purple", "draw an outline around it",
               "draw a {} outline around it", "add a {} outline", "with a {} outline"),
    *_coloured("cross", effects.cross, "red black blue", "cross it out",
               "cross it out in {}", "draw a {} cross over it", "with a {} cross over it"),
    *_family("filter", "change the look of the picture",
             ("invert", "invert the colours", "make it a negative", "in inverted colours", effects.invert),
             ("gray", "make it gray", "remove the colours", "in gray", effects.grayscale),
             ("sepia", "make it sepia", "make it look like an old photo", "in sepia", effects.sepia)),
    *_family("light", "change the light",
             ("dark", "make it darker", "turn the light down", "in the dark", effects.lit, (0.4, 0.4, 0.4)),
             ("faded", "make it paler", "fade it", "faded", effects.faded),
             ("night", "make it night", "show it in blue light", "at night", effects.lit, (0.3, 0.45, 0.95)),
             ("sunset", "make it sunset", "show it in orange light", "at sunset", effects.lit, (1.0, 0.65, 0.3))),
    *_family("swap", "swap its colours", *(
        (f"{first}_{second}", f"swap {first} and {second}", f"swap the {first} and {second} colours",
         f"with {first} and {second} swapped", effects.swapped, *channels)
        for first, second, *channels in (("red", "green", 0, 1), ("red", "blue", 0, 2), ("green", "blue", 1, 2)))),
    *_family("lines", "turn it into a line drawing",
             ("pencil", "draw it in black lines", "keep only the black lines", "in black lines",
              effects.lines, _WHITE, _BLACK),
             ("chalk", "draw it in white lines on black", "draw it in chalk", "in white lines on black",
              effects.lines, _BLACK, _WHITE)),
    *_family("soften", "make it less sharp",
             ("pixelate", "make big pixels of it", "pixelate it", "in big pixels", effects.pixelate),
             ("blur", "blur it", "make it blurry", "blurry", effects.blur)),
    *_family("flip", "flip it",
             ("sideways", "flip it left to right", "swap left and right", "flipped left to right", effects.flip, 1),
             ("over", "turn it upside down", "swap top and bottom", "upside down", effects.flip, 0)),
    *_family("rotate", "rotate it",
             ("right", "rotate it to the right", "turn it to the right", "turned to the right", effects.rotate, -90),
             ("left", "rotate it to the left", "turn it to the left", "turned to the left", effects.rotate, 90),
             ("around", "turn it by half a turn", "rotate it halfway", "turned halfway", effects.rotate, 180),
             ("tilt", "tilt it", "rotate it a little", "tilted", effects.rotate, 35)),
    *_family("shift", "move it",
             ("left", "move it to the left", "push it left", "at the left", effects.fitted, (-0.3, 0, 0.7, 1)),
             ("right", "move it to the right", "push it right", "at the right", effects.fitted, (0.3, 0, 1.3, 1)),
             ("up", "move it up", "push it to the top", "at the top", effects.fitted, (0, -0.3, 1, 0.7)),
             ("down", "move it down", "push it to the bottom", "at the bottom", effects.fitted, (0, 0.3, 1, 1.3))),
    *_family("size", "change its size",
             ("smaller", "make it smaller", "make it small", "small", effects.fitted, (0.25, 0.25, 0.75, 0.75)),
             ("larger", "make it larger", "make it large", "large", effects.fitted, (-0.3, -0.3, 1.3, 1.3))),
    *_family("squash", "squash it",
             ("flat", "make it flat", "squash it from the top", "flat", effects.fitted, (0, 0.25, 1, 0.75)),
             ("thin", "make it thin", "squash it from the side", "thin", effects.fitted, (0.25, 0, 0.75, 1))),
    *_family("repeat", "repeat it",
             ("beside", "draw it twice side by side", "show two beside each other", "twice side by side",
              effects.fitted, (0, 0.25, 0.5, 0.75), (0.5, 0.25, 1, 0.75)),
             ("stacked", "draw it twice above each other", "stack two of it", "twice above each other",
              effects.fitted, (0.25, 0, 0.75, 0.5), (0.25, 0.5, 0.75, 1)),
             ("four", "draw it four times", "show four of it", "four times",
              effects.fitted, (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))),
    *_family("dot", "put a dot in a corner", *(
        (f"{rows}_{columns}", f"put a dot at the {rows} {columns}", f"add a red dot at the {rows} {columns}",
         f"with a dot at the {rows} {columns}", effects.dot, _RED, columns == "right", rows == "bottom")
        for rows in ("top", "bottom") for columns in ("left", "right"))),
    *_family("pattern", "draw a pattern over it",
             ("level", "draw level stripes over it", "add level blue stripes", "with level stripes",
              effects.stripes, _BLUE, 0, 1),
             ("upright", "draw upright stripes over it", "add upright blue stripes", "with upright stripes",
              effects.stripes, _BLUE, 1, 0),
             ("diagonal", "draw diagonal stripes over it", "add diagonal blue stripes", "with diagonal stripes",
              effects.stripes, _BLUE, 0.75, 0.75),
             ("checker", "draw a checker pattern over it", "add blue squares", "with a checker pattern",
              effects.checker, _BLUE)),
    *_family("hide", "hide half of it", *(
        (part, f"hide the {part} half", f"cover the {part} half in gray", f"with the {part} half hidden",
         effects.hide, _GRAY, along_x, along_y)
        for part, along_x, along_y in (("left", -1, 0), ("right", 1, 0), ("top", 0, -1), ("bottom", 0, 1)))),
    *_family("shadow", "add a shadow", *(
        (side, f"add a shadow to the {side}", f"put a shadow on its {side} side", f"with a shadow on the {side}",
         effects.shadow, _GRAY, along_x, 1) for side, along_x in (("left", -1), ("right", 1)))),
    *_family("shape", "cut it into a shape",
             ("circle", "cut it into a circle", "show it in a circle", "in a circle", effects.disc, _BLACK),
             ("diamond", "cut it into a diamond", "show it in a diamond", "in a diamond", effects.diamond, _BLACK)),
    *_family("mirror", "mirror one half",
             ("left", "mirror the left half", "make the right half like the left", "with the left half mirrored",
              effects.mirror, 1),
             ("top", "mirror the top half", "make the bottom half like the top", "with the top half mirrored",
              effects.mirror, 0)),
]
# fmt: on

STYLES: dict[str, Style] = {
    name: Style("change its style", (f"draw it in {word} style", f"make it look like {word}"), f"in {word} style")
    for name, word in STYLE_WORDS.items()
}

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _ALL}

# fmt: off
# What the basis learns by default. Most families come with several parameters, which their instruction leaves open.
TRAINING_TASKS = (
    "tint_red", "tint_green", "tint_blue", "tint_yellow",
    "background_yellow", "background_pink", "background_blue", "background_green",
    "frame_red", "frame_blue", "frame_green", "frame_black",
    "silhouette_black", "silhouette_red", "silhouette_blue",
    "outline_red", "outline_blue", "outline_green",
    "filter_invert", "filter_gray", "filter_sepia",
    "light_dark", "light_faded", "light_night",
    "soften_pixelate", "soften_blur", "lines_pencil", "lines_chalk",
    "flip_sideways", "flip_over", "shift_left", "shift_right", "shift_down", "size_smaller", "size_larger",
    "dot_top_left", "dot_top_right", "dot_bottom_left",
    "pattern_level", "pattern_upright", "pattern_diagonal",
    "hide_left", "hide_right", "hide_top", "cross_red", "cross_black",
)
# Never shown to the basis: new parameters of families it knows, and (shape, repeat) families it does not.
HELD_OUT_TASKS = (
    "tint_purple", "background_orange", "frame_purple", "silhouette_green", "outline_purple", "light_sunset",
    "shift_up", "dot_bottom_right", "hide_bottom", "cross_blue",
    "shape_circle", "shape_diamond", "repeat_four",
)
# fmt: on


def operation(name: str) -> Operation:
    """The operation called `name`; KeyError with the name if there is none."""
    return OPERATIONS[name]


def composed(first: Operation, second: Operation) -> Operation:
    """`second` on what `first` makes of a drawing. ValueError where `second` needs a drawing's shape."""
    if second.needs_shape:
        raise ValueError(f"{second.name} needs the shape of a drawing, which {first.name} doesn't leave")

    def apply(rgba: np.ndarray) -> np.ndarray:
        image = first.apply(rgba)
        return second.apply(np.concatenate([image, np.full_like(image[..., :1], 255)], -1))

    both = [f"{one} and {other}" for one, other in zip(first.specific, second.specific)]
    return Operation(
        first.name,
        f"then_{second.name}",
        f"{first.instruction} and {second.instruction}",
        (both[0], both[1]),
        f"{first.describe} and {second.describe}",
        apply,
    )


# How the small base is told to change the last of a canvas's drawings and leave the others as they are.
LAST_ONLY = "{} in the last picture"


def all_sentences() -> list[str]:
    """Every sentence and description there is, once, in a fixed order: what a tokenizer has to know."""
    return list(
        dict.fromkeys(
            [
                *(
                    sentence
                    for operation in OPERATIONS.values()
                    for sentence in (operation.instruction, *operation.specific, operation.describe)
                ),
                *(
                    sentence
                    for style in STYLES.values()
                    for sentence in (style.instruction, *style.specific, style.describe)
                ),
                LAST_ONLY.format("change it"),
                *caption_words(),
            ]
        )
    )
