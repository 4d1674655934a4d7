"""Look inside: which members of the basis a result used, the training tasks nearest to it, and a map of analogies."""

from html import escape
from typing import Any

import gradio as gr

from lorweb_jax.common.errors import UserError
from lorweb_jax.images import svg
from lorweb_jax.studio import parts
from lorweb_jax.studio.atlas import Atlas, Place, by_block, by_layer
from lorweb_jax.studio.edit_view import EditView, Result
from lorweb_jax.studio.runner import Finished, Tell
from lorweb_jax.studio.studio import Step, Studio

NEAREST = 8
# A click on a dot, or Enter or Space while it has the focus.
_CHOOSE = """
const choose = (event) => {
  const dot = event.target.closest('[data-index]');
  if (!dot || (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ')) return;
  event.preventDefault();
  trigger('click', {index: Number(dot.dataset.index)});
};
element.addEventListener('click', choose);
element.addEventListener('keydown', choose);
"""


class LookView:
    """Builds the view where it is made, within gr.Blocks. edits: the view whose results are looked into."""

    def __init__(self, studio: Studio, edits: EditView, tabs: gr.Tabs, edit_tab: str):
        self.studio, self.edits, self._tabs, self._edit_tab = studio, edits, tabs, edit_tab
        self.atlas = Atlas(studio.pipeline, studio.data) if studio.data and studio.routed else None
        parts.hint(
            "Which members of the basis the result chosen in Edit uses, and which training tasks lie near it by their "
            "coefficients."
        )
        with gr.Row():
            self.run = gr.Button("Look inside", variant="primary", elem_id="look_run", min_width=120)
            self.stop = gr.Button("Stop", elem_id="look_stop", min_width=80)
        self.status = gr.HTML(parts.progress(None), elem_id="look_status")
        with gr.Row():
            with gr.Column(min_width=300):
                self.members = gr.HTML(elem_id="look_members", elem_classes="lw-figure")
                with gr.Accordion("Every block", open=False):
                    self.blocks = gr.HTML(elem_id="look_blocks", elem_classes="lw-figure")
            with gr.Column(min_width=300):
                self.map = gr.HTML(elem_id="look_map", elem_classes="lw-figure", js_on_load=_CHOOSE)
                self.nearest = gr.HTML(elem_id="look_nearest", elem_classes="lw-table")
        event = self.run.click(
            parts.sentences(self.look),
            [edits.history, edits.chosen],
            [self.status, self.members, self.blocks, self.map, self.nearest],
            concurrency_id=parts.DEVICE,
            concurrency_limit=1,
            show_progress="hidden",
            api_name="look",
        )
        parts.connect_stop(studio, self.stop, self.status, event)
        self.map.click(
            parts.sentences(self.load),
            None,
            [edits.a, edits.a2, edits.b, edits.prompt, tabs],
            show_progress="hidden",
            api_visibility="private",
        )

    def look(self, history: list[Result], chosen: int, request: gr.Request):
        """The components' values: figures of the chosen result, and, once the data were looked at, its place."""
        if not history:
            raise UserError("there is no result to look into yet; make one in Edit first")
        mix = history[chosen].mix
        if mix is None:
            raise UserError(
                "the coefficients of this result are not known beforehand; attach a basis whose router asks the image "
                "encoder"
            )
        values = {
            self.members: f"<h3>Share of each member, by layer</h3>{svg.heat_map(*by_layer(mix))}",
            self.blocks: svg.heat_map(*by_block(mix)),
        }
        if self.atlas is None:
            yield values | {self.map: "<p>No data set to compare with: start the page with --data.</p>"}
            return
        yield values | {self.status: parts.progress(None, "Waiting for the model.")}
        atlas = self.atlas

        def work(tell: Tell) -> Place:
            atlas.fill(lambda done, total: tell(Step(done, total)))
            return atlas.place(mix)

        for event in self.studio.runner.stream(parts.tab(request), work):
            if isinstance(event, Finished):
                yield {
                    self.status: parts.progress(None, "Done."),
                    self.map: self._map(atlas, event.result),
                    self.nearest: _table(event.result),
                }
            else:
                yield {self.status: parts.progress(event, "Looking at the training tasks, once.")}

    def load(self, event: gr.EventData) -> dict[Any, Any]:
        """The analogy of a dot, in the edit view."""
        index = getattr(event, "index", None) if event._data else None
        if self.atlas is None or not isinstance(index, int) or not 0 <= index < len(self.atlas.analogies):
            raise UserError("there is no analogy at this place of the map; choose a dot")
        analogy = self.atlas.analogies[index]
        a, a2, b = map(parts.picture, self.atlas.images(analogy))
        edits = self.edits
        return {
            edits.a: a,
            edits.a2: a2,
            edits.b: [b],
            edits.prompt: analogy.caption,
            self._tabs: gr.Tabs(selected=self._edit_tab),
        }

    def _map(self, atlas: Atlas, place: Place) -> str:
        tasks = [analogy.task for analogy in atlas.analogies]
        colours = dict(zip(dict.fromkeys(tasks), svg.hues(len(set(tasks)))))
        dots = svg.dots(
            place.plane.tolist(),
            "first component",
            "second",
            [*tasks, "this result"],
            [*(colours[task] for task in tasks), "var(--body-text-color)"],
            least_height=0.7,
            choices=range(len(tasks)),
        )
        return (
            f"<h3>Analogies by their coefficients</h3><p>The plane keeps {place.explained:.0%} of the variance. A dot"
            " is an analogy of the training data; choosing one loads it into Edit. The result is the dot in the text's "
            f"colour.</p>{dots}"
        )


def _table(place: Place) -> str:
    rows = "".join(
        f"<tr><td>{escape(task)}</td><td>{distance:.3f}</td></tr>" for task, distance in place.nearest[:NEAREST]
    )
    return (
        "<h3>Nearest training tasks</h3><table><thead><tr><th scope=col>task</th><th scope=col>distance of coefficients"
        f"</th></tr></thead><tbody>{rows}</tbody></table>"
    )
