"""Pieces of the page that several views use."""

import contextlib
import functools
import inspect
import shlex
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError, message_and_status
from lorweb_jax.studio.runner import Stopped
from lorweb_jax.studio.studio import Step, Studio

STOPPED = "Stopped."
DEVICE = "device"  # the queue of all that needs the model


def upload(label: str, **options: Any) -> gr.Image:
    """An upload of one picture. Handlers get its file's path, or None: lorweb_jax reads it, with its own checks."""
    image = gr.Image(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        height=210,
        format="png",
        elem_classes="lw-picture",
        **options,
    )
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def uploads(label: str, columns: int = 4, **options: Any) -> gr.Gallery:
    """An upload of several pictures. Handlers get a list of paths."""
    gallery = gr.Gallery(
        label=label,
        type="filepath",
        interactive=True,
        columns=columns,
        height=210,
        fit_columns=False,
        object_fit="contain",
        format="png",
        sources=["upload"],
        elem_classes="lw-gallery",
        **options,
    )
    gallery.preprocess = _paths  # pyrefly: ignore[bad-assignment]
    return gallery


def _paths(payload: Any) -> list[str]:
    files = [getattr(item, "image", None) or getattr(item, "video", None) for item in payload.root] if payload else []
    return [file.path for file in files if file]


def in_words(error: BaseException) -> gr.Error:
    """One sentence for the page; of a bug of the program its kind, and the traceback in the terminal."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, Stopped):
        return gr.Error(STOPPED, title="", print_exception=False)
    if expected := message_and_status(error):
        return gr.Error(escape(expected[0].removeprefix("error: ")), duration=20, title="", print_exception=False)
    return gr.Error(
        f"The studio failed ({escape(type(error).__name__)}); its terminal says more.", duration=20, title=""
    )


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as error:
        words = in_words(error)
        raise words from (error if words.print_exception else None)


@contextlib.contextmanager
def called(file: str, name: str) -> Iterator[None]:
    """UserErrors within call an uploaded file `name`, not by where this machine keeps it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(file, name)) from None


def sentences(handler: Callable) -> Callable:
    """The handler of an event, plain or a generator, whose errors the page shows as one sentence."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def run(*arguments: Any):
            with _in_words():
                yield from handler(*arguments)
    else:

        @functools.wraps(handler)
        def run(*arguments: Any):
            with _in_words():
                return handler(*arguments)

    return run


def progress(step: Step | None, words: str = "") -> str:
    """A bar with its label, and a line that screen readers read when it changes."""
    bar = ""
    if step:
        bar = (
            f'<progress max="{step.total}" value="{step.done}" aria-label="sampling steps"></progress>'
            f"<span>{step.done} of {step.total} steps</span>"
        )
    return f'<div class="lw-progress">{bar}<span role="status" aria-live="polite">{escape(words)}</span></div>'


def shown_picture(label: str, *, elem_id: str, height: int) -> gr.Image:
    """A picture of the page's, to look at and to download as PNG."""
    return gr.Image(
        label=label,
        interactive=False,
        format="png",
        height=height,
        buttons=["download", "fullscreen"],
        elem_classes="lw-picture",
        elem_id=elem_id,
    )


def shown_command(*, elem_id: str) -> gr.Textbox:
    return gr.Textbox(
        "",
        label="The same by a command, in the pictures' folder",
        lines=3,
        interactive=False,
        buttons=["copy"],
        elem_id=elem_id,
    )


class Sampling(NamedTuple):
    """Controls of the sampling, in the order in which handlers get their values."""

    steps: gr.Slider
    guidance: gr.Slider
    true_guidance: gr.Slider
    negative: gr.Textbox
    seed: gr.Number

    @classmethod
    def build(cls, steps: int, guidance: float, true_guidance: float) -> "Sampling":
        with gr.Accordion("Sampling", open=False):
            with gr.Row():
                of_steps = gr.Slider(1, 100, steps, step=1, label="Steps", min_width=140)
                seed = gr.Number(0, precision=0, label="Seed", minimum=0, min_width=120)
            with gr.Row():
                of_guidance = gr.Slider(0, 10, guidance, step=0.1, label="Guidance input of the model", min_width=140)
                true = gr.Slider(
                    0, 10, true_guidance, step=0.1, label="True guidance (1: none; else twice the cost)", min_width=140
                )
            negative = gr.Textbox("", label="Negative prompt (with true guidance)", lines=1)
        return cls(of_steps, of_guidance, true, negative, seed)


def sampling_options(steps: Any, guidance: Any, true_guidance: Any, negative: Any, seed: Any) -> dict[str, Any]:
    """Values of `Sampling`'s controls as options of Pipeline's methods, which check them."""
    if seed is None:
        raise UserError("the seed is empty; give a whole number, such as 0")
    options = {"steps": steps, "guidance": guidance, "true_guidance": true_guidance, "seed": seed}
    if negative:
        options["negative_prompt"] = negative
    return options


def command_line(words: Sequence[Any]) -> str:
    """Words as one command of the shell."""
    return " ".join(shlex.quote(str(word)) for word in words)


def sampling_words(options: dict[str, Any]) -> list[Any]:
    """The same options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def tab(request: gr.Request) -> str:
    """What tells the browser's tab from others."""
    return request.session_hash or ""


def connect_stop(studio: Studio, button: gr.Button, status: gr.HTML, event: Any) -> None:
    """Pressing the button ends the event's work, whether it runs or waits."""

    def stop(request: gr.Request) -> str:
        studio.runner.stop(tab(request))
        return progress(None, STOPPED)

    button.click(stop, None, status, cancels=[event], queue=False, show_progress="hidden", api_visibility="private")


def hint(text: str) -> gr.Markdown:
    return gr.Markdown(text, elem_classes="lw-hint")


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image)
