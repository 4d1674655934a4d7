"""Style: what a prompt draws or a picture shows, guided towards styles, each as strongly as its slider says."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.pipeline.styles import STRENGTH_DEFAULT, Style
from lorweb_jax.studio import parts
from lorweb_jax.studio.parts import Sampling
from lorweb_jax.studio.studio import Adapted, Done, Step, Studio


class StyleView:
    """Builds the view where it is made, within gr.Blocks."""

    def __init__(self, studio: Studio):
        self.studio = studio
        parts.hint(
            "Draw from words, or put a style on a picture. At strength 0 a style takes no part; a negative strength "
            "leads away from it."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                self.prompt = gr.Textbox(
                    "", label="Prompt: what to draw, or what the picture shows", elem_id="style_prompt"
                )
                self.picture = parts.upload("Picture to put the style on (may be empty)", elem_id="style_picture")
                self.strengths = [
                    gr.Slider(
                        -20,
                        20,
                        style.strength if number == 0 else 0,
                        step=0.5,
                        label=f"Strength of {style.name}" + f" ({style.words})" * bool(style.words),
                        elem_id=f"style_strength_{number}",
                    )
                    for number, style in enumerate(studio.styles.values())
                ]
                with gr.Accordion("Another style: a LoRA's or style's file", open=not studio.styles):
                    self.file = gr.File(label="File", file_types=[".safetensors"], height=110, elem_id="style_file")
                    self.of_file = gr.Slider(
                        -20,
                        20,
                        STRENGTH_DEFAULT,
                        step=0.5,
                        label="Strength of the file's style",
                        elem_id="style_strength",
                    )
                    self.words = gr.Textbox("", label="Style words, which follow the prompt in the style's own pass")
                self.sampling = Sampling.build(28, 1, 4)
                with gr.Row():
                    self.run = gr.Button("Draw", variant="primary", elem_id="style_run", min_width=120)
                    self.stop = gr.Button("Stop", elem_id="style_stop", min_width=80)
            with gr.Column(min_width=300):
                self.status = gr.HTML(parts.progress(None), elem_id="style_status")
                self.result = parts.shown_picture("Result", elem_id="style_result", height=420)
                self.command = parts.shown_command(elem_id="style_command")
        event = self.run.click(
            parts.sentences(self.draw),
            [self.prompt, self.picture, self.file, self.of_file, self.words, *self.sampling, *self.strengths],
            [self.status, self.result, self.command],
            concurrency_id=parts.DEVICE,
            concurrency_limit=1,
            show_progress="hidden",
            api_name="style",
        )
        parts.connect_stop(studio, self.stop, self.status, event)

    def draw(
        self,
        prompt: str,
        picture: str | None,
        file: str | None,
        of_file: float,
        words: str,
        steps: int,
        guidance: float,
        true_guidance: float,
        negative: str,
        seed: int | None,
        request: gr.Request,
        *strengths: float,
    ):
        """The components' values as the sampling goes. strengths: of the command line's styles."""
        options = parts.sampling_options(steps, guidance, true_guidance, negative, seed)
        image = self.studio.read(picture, "the picture") if picture else None
        if image is None and not prompt.strip():
            raise UserError("neither a prompt nor a picture was given; write what to draw, or upload a picture")
        styles = {
            source: dataclasses.replace(style, strength=strength)
            for (source, style), strength in zip(self.studio.styles.items(), strengths)
            if strength
        }
        if file and of_file:
            styles[Path(file).name] = self._uploaded(file, of_file, words)
        yield {self.status: parts.progress(None, "Waiting for the model."), self.command: ""}

        def make(more: dict[str, Any], _: Adapted) -> np.ndarray:
            with self.studio.pipeline.session(use_basis=False, styles=list(styles.values())) as session:
                return session.generate(prompt, image, max_size=self.studio.limits.size, **options, **more)

        for event in self.studio.run(parts.tab(request), [make], steps):
            if isinstance(event, Done):
                yield {
                    self.status: parts.progress(Step(steps, steps), "Done."),
                    self.result: parts.picture(event.image),
                    self.command: self._command(prompt, picture, styles, options),
                }
            elif event.preview is not None:
                yield {self.status: parts.progress(event, "Sampling."), self.result: parts.picture(event.preview)}
            else:
                yield {self.status: parts.progress(event, "Sampling.")}

    def _uploaded(self, file: str, strength: float, words: str) -> Style:
        with parts.called(file, Path(file).name):
            return self.studio.pipeline.style(file, strength, words, name=Path(file).stem)

    def _command(self, prompt: str, picture: str | None, styles: Mapping[str, Style], options: dict[str, Any]) -> str:
        words: list[Any] = self.studio.words("stylize" if styles else "edit", basis=False)
        if styles:
            words += ["--style", *(f"{source}:{each.strength:g}:{each.words}" for source, each in styles.items())]
        words += ["--prompt", prompt, *(["--image", Path(picture).name] if picture else [])]
        words += ["--max-size", self.studio.limits.size] if picture else []
        return parts.command_line([*words, *parts.sampling_words(options), "--out", "result.png"])
