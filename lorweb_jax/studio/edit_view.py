"""Edit: a, a′ and several b's; strength, previews, a swipe between b and b′, the tab's history, downloads."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from lorweb_jax.adapters.formats.lora_file import NAMES
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.images.grid import stretched
from lorweb_jax.images.resize import resize
from lorweb_jax.studio import parts
from lorweb_jax.studio.parts import Sampling
from lorweb_jax.studio.studio import Adapted, Step, Studio

KEPT = 24  # results in a tab's history


class Result(NamedTuple):
    """One edit of a tab's history. b: in the image's size. mix: with strength and adaptation; None where it
    isn't known."""

    image: np.ndarray
    b: np.ndarray
    mix: Mix | None
    prompt: str
    strength: float
    adapt: int
    command: str


class EditView:
    """Builds the view where it is made, within gr.Blocks. `history` holds the tab's Results, newest first."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.history, self.chosen = gr.State([]), gr.State(0)
        parts.hint(
            "Show the edit by a pair, a → a′; every b is edited likewise."
            + ("" if studio.has_basis else " No basis is attached: the base follows the prompt alone.")
        )
        with gr.Row():
            with gr.Column(min_width=300):
                self._build_inputs()
            with gr.Column(min_width=300):
                self._build_results()
        self.gallery = gr.Gallery(
            label="Results of this tab; choose one to bring it back",
            columns=8,
            height=230,
            fit_columns=False,
            object_fit="contain",
            interactive=False,
            allow_preview=False,
            format="png",
            elem_classes="lw-gallery",
            elem_id="edit_history",
        )
        self._connect()

    def _build_inputs(self) -> None:
        with gr.Row():
            self.a = parts.upload("a, before", elem_id="edit_a", min_width=130)
            self.a2 = parts.upload("a′, after", elem_id="edit_a2", min_width=130)
        self.b = parts.uploads("b, one or more to edit likewise", elem_id="edit_b")
        self.prompt = gr.Textbox("", label="Prompt: the edit in words (the small base needs it)", elem_id="edit_prompt")
        self.strength = gr.Slider(
            -2,
            3,
            1,
            step=0.05,
            label="Strength: 0 is the base alone, 1 as trained",
            visible=self.studio.has_mixes,
            elem_id="edit_strength",
        )
        self.adapt = gr.Slider(
            0,
            64,
            0,
            step=1,
            label="Adapt to the pair: gradient steps (0: as the router chooses)",
            visible=self.studio.has_mixes,
            elem_id="edit_adapt",
        )
        self.sampling = Sampling.build(28, 2.5, 1)
        with gr.Row():
            self.run = gr.Button("Edit", variant="primary", elem_id="edit_run", min_width=120)
            self.stop = gr.Button("Stop", elem_id="edit_stop", min_width=80)

    def _build_results(self) -> None:
        self.status = gr.HTML(parts.progress(None), elem_id="edit_status")
        self.swipe = gr.ImageSlider(
            label="b | result",
            interactive=False,
            format="png",
            max_height=420,
            buttons=["fullscreen"],
            elem_id="edit_swipe",
        )
        self.result = parts.shown_picture("Result", elem_id="edit_result", height=290)
        with gr.Accordion("Take it elsewhere", open=False):
            with gr.Row():
                self.names = gr.Dropdown(list(NAMES), value="diffusers", label="Layers' names of", min_width=120)
                self.rank = gr.Number(0, precision=0, minimum=0, label="Rank (0: exact)", min_width=100)
                self.make_lora = gr.Button("Analogy as a LoRA", elem_id="edit_lora", min_width=140)
            self.lora = gr.File(label="LoRA (.safetensors)", interactive=False, elem_id="edit_lora_file")
            self.command = parts.shown_command(elem_id="edit_command")

    def _connect(self) -> None:
        of_result = [self.swipe, self.result, self.command, self.chosen, self.lora]
        event = self.run.click(
            parts.sentences(self.edit),
            [self.a, self.a2, self.b, self.prompt, self.strength, *self.sampling, self.adapt, self.history],
            [self.status, *of_result, self.history, self.gallery],
            concurrency_id=parts.DEVICE,
            concurrency_limit=1,
            show_progress="hidden",
            api_name="edit",
        )
        parts.connect_stop(self.studio, self.stop, self.status, event)
        self.gallery.select(
            parts.sentences(self.bring_back),
            [self.history],
            [*of_result, self.prompt, self.strength, self.adapt],
            show_progress="hidden",
            api_visibility="private",
        )
        self.make_lora.click(
            parts.sentences(self.save_lora),
            [self.history, self.chosen, self.names, self.rank],
            [self.lora],
            api_name="lora",
        )

    def edit(
        self, a, a2, b, prompt, strength, steps, guidance, true_guidance, negative, seed, adapt, history,
        request: gr.Request,
    ):  # fmt: skip
        """The components' values as the sampling goes."""
        options = parts.sampling_options(steps, guidance, true_guidance, negative, seed)
        adapt = adapt if adapt and self.studio.has_mixes else 0
        pair = self.studio.read(a, "a"), self.studio.read(a2, "a′")
        news = self.studio.read_all(b, "b")
        for sentence in stretched([(*pair, new) for new in news]):
            gr.Warning(parts.escape(sentence.replace("a2 ", "a′ ")), title="")
        mixes: list[Mix | None] = [None] * len(news)

        def make(number: int, more: dict[str, Any], adapted: Adapted) -> np.ndarray:
            mix = self.studio.coefficients(pair, news[number])
            if adapt and mix is not None:
                mix = self.studio.adapt(mix, pair, news[number], prompt, adapt, options["seed"], adapted)
            mixes[number] = mix if mix is None or strength == 1 else strength * mix
            return self.studio.edit(pair, news[number], prompt, mixes[number], options | more)

        yield {self.status: parts.progress(None, "Waiting for the model."), self.command: "", self.lora: None}
        images, number = [functools.partial(make, i) for i in range(len(news))], 0
        for event in self.studio.run(parts.tab(request), images, steps, adapt):
            if isinstance(event, Step):
                words = "Adapting to the pair." if event.adapting else "Sampling."
                values = {self.status: parts.progress(event, words)}
                if event.preview is not None:
                    values |= self._shown(news[number], event.preview)
                yield values
                continue
            image, new = event.image, news[number]
            command = self._command((a, a2, b[number]), prompt, strength, options, adapt)
            result = Result(image, _fitted(new, image), mixes[number], prompt, strength, adapt, command)
            history = [result, *history][:KEPT]
            number += 1
            words = "Done." if number == len(news) else f"Result {number} of {len(news)} is done."
            yield {
                self.status: parts.progress(Step((adapt + steps) * number, (adapt + steps) * len(news)), words),
                self.history: history,
                self.gallery: [parts.picture(each.image) for each in history],
                **self._of_result(history, 0),
            }

    def bring_back(self, history: list[Result], event: gr.SelectData):
        result = history[event.index]
        of_edit = {self.prompt: result.prompt, self.strength: result.strength, self.adapt: result.adapt}
        return self._of_result(history, event.index) | of_edit

    def save_lora(self, history: list[Result], chosen: int, names: str, rank: int | None) -> str:
        """The chosen result's analogy as a LoRA's file."""
        if not history:
            raise UserError("there is no result yet, whose analogy could be written; press Edit first")
        return self.studio.lora(history[chosen].mix, names, rank)

    def _of_result(self, history: list[Result], index: int) -> dict[Any, Any]:
        result = history[index]
        of_file = {self.command: result.command, self.chosen: index, self.lora: None}
        return self._shown(result.b, result.image) | of_file

    def _shown(self, b: np.ndarray, image: np.ndarray) -> dict[Any, Any]:
        picture = parts.picture(image)
        return {self.swipe: (parts.picture(_fitted(b, image)), picture), self.result: picture}

    def _command(
        self, paths: tuple[str, str, str], prompt: str, strength: float, options: dict[str, Any], adapt: int
    ) -> str:
        a, a2, b = (Path(path).name for path in paths)
        words = [*self.studio.words("edit"), "--a", a, "--a2", a2, "--b", b]
        words += ["--prompt", prompt] if prompt else []
        words += [*parts.sampling_words(options), "--max-size", self.studio.limits.size]
        if self.studio.has_mixes:
            words += ["--strength", strength] if strength != 1 else []
            words += ["--adapt", adapt] if adapt else []
        return parts.command_line([*words, "--out", "result.png"])


def _fitted(b: np.ndarray, image: np.ndarray) -> np.ndarray:
    """b in the result's size."""
    return resize(b, (image.shape[1], image.shape[0]))
