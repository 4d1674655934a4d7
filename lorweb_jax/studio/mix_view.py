"""Mix: several analogies as cards, added, subtracted and blended by sliders; paths from one to another; grids."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from lorweb_jax.adapters.formats.lora_file import NAMES
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.studio import parts
from lorweb_jax.studio.parts import Sampling
from lorweb_jax.studio.studio import Adapted, Step, Studio

CARDS = 4
Pair = tuple[np.ndarray, np.ndarray]


class Card(NamedTuple):
    """One analogy's controls, in the order in which handlers get their values."""

    before: gr.Gallery
    after: gr.Gallery
    file: gr.File
    weight: gr.Slider


class CardValues(NamedTuple):
    """What a card holds: paths of the pictures a and a′, and of a saved mix."""

    before: list[str]
    after: list[str]
    file: str | None
    weight: float


class MixView:
    """Builds the view where it is made, within gr.Blocks."""

    def __init__(self, studio: Studio):
        self.studio, self.mix = studio, gr.State(None)
        parts.hint(
            "Each card is an analogy: example pairs a → a′ in the same order (their mean counts), or a saved mix. The "
            "result is the sum of the cards at their weights; the model is shown the first pair that there is."
        )
        with gr.Row():
            self.cards = [self._card(number) for number in range(CARDS)]
        with gr.Row():
            with gr.Column(min_width=300):
                self.b = parts.upload("b, to edit", elem_id="mix_b")
                self.prompt = gr.Textbox("", label="Prompt: the edit in words", elem_id="mix_prompt")
                self.sampling = Sampling.build(28, 2.5, 1)
                with gr.Row():
                    self.run = gr.Button("Mix", variant="primary", elem_id="mix_run", min_width=90)
                    self.path = gr.Button("Path 1 to 2", elem_id="mix_path", min_width=120)
                    self.grid = gr.Button("Grid 1 by 2", elem_id="mix_grid", min_width=120)
                    self.stop = gr.Button("Stop", elem_id="mix_stop", min_width=80)
                self.count = gr.Slider(
                    3, 7, 5, step=1, label="Pictures of the path, or along each side of the grid", elem_id="mix_count"
                )
                with gr.Row():
                    self.low = gr.Slider(-2, 1, 0, step=0.1, label="From (place or weight)", min_width=140)
                    self.high = gr.Slider(0, 3, 1, step=0.1, label="To", min_width=140)
            with gr.Column(min_width=300):
                self.status = gr.HTML(parts.progress(None), elem_id="mix_status")
                self.results = gr.Gallery(
                    label="Results",
                    columns=5,
                    interactive=False,
                    format="png",
                    object_fit="contain",
                    height="auto",
                    elem_classes="lw-gallery",
                    elem_id="mix_results",
                )
                with gr.Accordion("Keep the mix", open=False):
                    with gr.Row():
                        self.names = gr.Dropdown(
                            ["saved mix", *NAMES], value="saved mix", label="As", min_width=120, elem_id="mix_names"
                        )
                        self.save = gr.Button("Write the file", elem_id="mix_save", min_width=120)
                    self.file = gr.File(label="File", interactive=False, elem_id="mix_file")
        self._connect()

    def _card(self, number: int) -> Card:
        with gr.Column(min_width=240, variant="panel"):
            gr.Markdown(f"**{number + 1}**")
            before = parts.uploads("a's, before", elem_id=f"mix_before_{number}", columns=2)
            after = parts.uploads("a′s, after", elem_id=f"mix_after_{number}", columns=2)
            with gr.Accordion("Or a saved mix", open=False):
                file = gr.File(label="Saved mix", file_types=[".safetensors"], height=90, elem_id=f"mix_saved_{number}")
            weight = gr.Slider(
                -2,
                2,
                1 if number == 0 else 0,
                step=0.05,
                label=f"Weight of {number + 1}",
                elem_id=f"mix_weight_{number}",
            )
        return Card(before, after, file, weight)

    def _connect(self) -> None:
        inputs = [self.b, self.prompt, *self.sampling, self.count, self.low, self.high]
        inputs += [part for card in self.cards for part in card]
        for button, handler, name in (
            (self.run, self.one, "mix"),
            (self.path, self.along, "path"),
            (self.grid, self.over, "grid"),
        ):
            event = button.click(
                parts.sentences(handler),
                inputs,
                [self.status, self.results, self.mix],
                concurrency_id=parts.DEVICE,
                concurrency_limit=1,
                show_progress="hidden",
                api_name=name,
            )
            parts.connect_stop(self.studio, self.stop, self.status, event)
        self.save.click(
            parts.sentences(self.write), [self.mix, self.prompt, self.names], [self.file], api_name="save_mix"
        )

    def one(self, b, prompt, steps, guidance, true, negative, seed, count, low, high, request: gr.Request, *cards):
        """The sum of the cards at their weights."""
        used = cards_in_use(cards)
        weights = [card.weight for _, card in used]
        caption = " + ".join(f"{card.weight:g} x {number}" for number, card in used)
        options = parts.sampling_options(steps, guidance, true, negative, seed)
        yield from self._make(b, prompt, options, request, used, [(caption, weights)])

    def along(self, b, prompt, steps, guidance, true, negative, seed, count, low, high, request: gr.Request, *cards):
        """Pictures from the first analogy (place 0) to the second (place 1)."""
        used = cards_in_use(cards, 2)[:2]
        plan = [(f"{t:.2g}", [1 - t, t]) for t in np.linspace(low, high, count).tolist()]
        options = parts.sampling_options(steps, guidance, true, negative, seed)
        yield from self._make(b, prompt, options, request, used, plan)

    def over(self, b, prompt, steps, guidance, true, negative, seed, count, low, high, request: gr.Request, *cards):
        """Pictures over the weights of the first two analogies, row by row; the others keep theirs."""
        used = cards_in_use(cards, 2)
        rest = [card.weight for _, card in used[2:]]
        values = np.linspace(low, high, count).tolist()
        plan = [(f"{x:.2g}, {y:.2g}", [x, y, *rest]) for x, y in itertools.product(values, values)]
        options = parts.sampling_options(steps, guidance, true, negative, seed)
        yield from self._make(b, prompt, options, request, used, plan)

    def write(self, mix: Mix | None, prompt: str, names: str) -> str:
        """The last mix as a file: a saved mix, or a LoRA."""
        if mix is None:
            raise UserError("there is no mix yet; press Mix first")
        if names in NAMES:
            return self.studio.lora(mix, names, None)
        path = self.studio.file("mix.safetensors")
        self.studio.pipeline.save_mix(path, mix, prompt=prompt)
        return str(path)

    def _make(
        self,
        b: str | None,
        prompt: str,
        options: dict[str, Any],
        request: gr.Request,
        used: Sequence[tuple[int, CardValues]],
        plan: Sequence[tuple[str, list[float]]],
    ):
        """The components' values as the plan's pictures are made: a caption and the weights of the cards in use."""
        new = self.studio.read(b, "b")
        pairs = [self._pairs(number, card) for number, card in used]
        example = next((of_card[0] for of_card in pairs if of_card), None)
        if example is None:
            raise UserError("the model is shown an example pair, and there is none; upload one on any card")
        saved = [self._saved(number, card) for number, card in used]
        yield {self.status: parts.progress(None, "Waiting for the model."), self.results: []}
        mixes: list[Mix] = []
        steps, total, shown = options["steps"], len(plan), []

        def make(weights: list[float], more: dict[str, Any], _: Adapted) -> np.ndarray:
            if not mixes:  # on the device's turn, for the router needs it
                mixes.extend(self._mix(of_card, mix, new) for of_card, mix in zip(pairs, saved))
            return self.studio.edit(example, new, prompt, weighted(mixes, weights), options | more)

        images = [functools.partial(make, weights) for _, weights in plan]
        for event in self.studio.run(parts.tab(request), images, steps):
            if isinstance(event, Step):
                yield {self.status: parts.progress(event, "Sampling.")}
                continue
            caption, weights = plan[len(shown)]
            shown.append((parts.picture(event.image), caption))
            yield {
                self.status: parts.progress(
                    Step(steps * len(shown), steps * total), "Done." if len(shown) == total else "Sampling."
                ),
                self.results: shown,
                self.mix: weighted(mixes, weights),
            }

    def _pairs(self, number: int, card: CardValues) -> list[Pair]:
        """A card's example pairs; UserError where the numbers of a's and a′s differ."""
        if len(card.before) != len(card.after):
            raise UserError(
                f"card {number} has {len(card.before)} pictures before the edit and {len(card.after)} after it; upload "
                "an a′ for each a, in the same order"
            )
        if not card.before:
            return []
        before = self.studio.read_all(card.before, f"a of card {number}")
        after = self.studio.read_all(card.after, f"a′ of card {number}")
        return list(zip(before, after))

    def _saved(self, number: int, card: CardValues) -> Mix | None:
        if not card.file:
            return None
        with parts.called(card.file, f"the file of card {number}"):
            return self.studio.pipeline.load_mix(card.file).mix

    def _mix(self, pairs: list[Pair], saved: Mix | None, b: np.ndarray) -> Mix:
        """A card's mix: the saved one, or the mean of what the router chooses for its pairs."""
        if saved is not None:
            return saved
        (a, a2), *more = pairs
        return self.studio.pipeline.coefficients(a, a2, b, more_pairs=more)


def cards_in_use(values: Sequence[Any], least: int = 1) -> list[tuple[int, CardValues]]:
    """(number from 1, card) of the cards that hold an analogy, of all controls' values in a row; UserError for fewer
    than `least`."""
    width = len(CardValues._fields)
    cards = [CardValues(*values[i : i + width]) for i in range(0, len(values), width)]
    used = [(number, card) for number, card in enumerate(cards, 1) if card.before or card.after or card.file]
    if len(used) < least:
        raise UserError(
            f"{len(used)} cards hold an analogy, {least} or more were expected; upload example pairs or a saved mix"
        )
    return used


def weighted(mixes: Sequence[Mix], weights: Sequence[float]) -> Mix:
    """Σ weight · mix. UserError for a weight that is no number."""
    total, *more = (weight * mix for weight, mix in zip(weights, mixes, strict=True))
    return sum(more, total)
