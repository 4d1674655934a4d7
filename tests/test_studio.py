"""The page in the browser: what its handlers make is what the API makes, each tab for itself; every mistake is one
sentence; nothing of the machine is served; work that nobody waits for ends."""

import dataclasses
import io
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from compare import relative
from golden import INPUTS, golden_dir
from PIL import Image

gr = pytest.importorskip("gradio", reason="Gradio, the extra [demo], is not installed")
httpx = pytest.importorskip("httpx")

from lorweb_jax import UserError, demo, read_image, write_image  # noqa: E402
from lorweb_jax.adapters.formats.mix_file import write_mix  # noqa: E402
from lorweb_jax.studio import page as pages  # noqa: E402
from lorweb_jax.studio import parts  # noqa: E402
from lorweb_jax.studio.edit_view import EditView, Result  # noqa: E402
from lorweb_jax.studio.look_view import LookView  # noqa: E402
from lorweb_jax.studio.mix_view import MixView  # noqa: E402
from lorweb_jax.studio.runner import Finished, Runner, Stopped  # noqa: E402
from lorweb_jax.studio.studio import Limits  # noqa: E402
from lorweb_jax.studio.style_view import StyleView  # noqa: E402

STEPS, PATIENCE = 2, 90_000  # ms, for a machine with much else to do
LIMITS = Limits(nbytes=300_000, pixels=100_000, size=64, pictures=3)


@pytest.fixture(scope="module")
def studio(quick_module):
    """As the command opens it, with lower limits."""
    paths = golden_dir() / "tiny_pipeline", golden_dir() / "basis_a.safetensors"
    studio = demo.open_studio(demo.parse(["--pipeline", str(paths[0]), "--basis", str(paths[1])]))
    studio.limits = LIMITS
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def pipeline(studio):
    return studio.pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a.png, a2.png, b.png and c.png of 32 pixels."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    return {
        name: str(write_image(folder / f"{name}.png", random.integers(0, 256, (32, 32, 3), np.uint8)))
        for name in ("a", "a2", "b", "c")
    }


@pytest.fixture(scope="module")
def images(files):
    return {name: read_image(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def view(studio):
    with gr.Blocks():
        return EditView(studio)


@pytest.fixture(scope="module")
def edited(view, files):
    """All that the page shows in the end of one edit."""
    return list(edit(view, files["a"], files["a2"], [files["b"]]))[-1]


@pytest.fixture(scope="module")
def address(studio):
    page = pages.build(studio)
    yield pages.serve(page, studio, port=17860)
    page.close(verbose=False)


class Tab:
    """What Gradio hands to a handler of the browser's tab."""

    def __init__(self, session_hash="tab"):
        self.session_hash = session_hash


def edit(view, a, a2, b, prompt="", strength=1, steps=STEPS, seed=0, history=(), tab="tab", adapt=0):
    """All that the handler shows, in order."""
    return view.edit(a, a2, b, prompt, strength, steps, 2.5, 1, "", seed, adapt, list(history), Tab(tab))


def test_an_edit_is_the_api_s(view, pipeline, files, images):
    """Two b's at strength 0.5: each the edit by half its own mix; previews on the way, all steps counted."""
    shown = list(edit(view, files["a"], files["a2"], [files["b"], files["c"]], "a frame", 0.5, seed=7))
    new, old = shown[-1][view.history]
    for result, name in ((old, "b"), (new, "c")):
        analogy = (images["a"], images["a2"], images[name])
        mix = 0.5 * pipeline.coefficients(*analogy)
        expected = pipeline.edit(
            *analogy, "a frame", mix=mix, folded=False, max_size=64, steps=STEPS, seed=7, callback=lambda *_: None
        )
        np.testing.assert_array_equal(result.image, expected)
        for path, c in mix.coefficients.items():
            np.testing.assert_array_equal(result.mix.coefficients[path], c)
    assert f"{2 * STEPS} of {2 * STEPS} steps" in shown[-1][view.status] and "Done." in shown[-1][view.status]
    previews = [values for values in shown if view.swipe in values and view.history not in values]
    assert len(previews) == 2 * (STEPS - 1)
    assert len(shown[-1][view.gallery]) == 2
    assert "--strength 0.5" in new.command and "--b c.png" in new.command and "--prompt 'a frame'" in new.command


def test_an_edit_adapts_to_the_pair(view, pipeline, files, images):
    """Its mix is the API's after as many steps, times the strength; each step is told, Stop ends it within one."""
    shown = list(edit(view, files["a"], files["a2"], [files["b"]], "a frame", 0.5, seed=3, adapt=2))
    [result] = shown[-1][view.history]
    mix = 0.5 * pipeline.adapt(*(images[name] for name in ("a", "a2", "b")), "a frame", steps=2, seed=3, max_size=64)
    for path, c in mix.coefficients.items():
        np.testing.assert_array_equal(result.mix.coefficients[path], c)
    told = [values[view.status] for values in shown]
    assert sum("Adapting" in words for words in told) == 2 and f"{2 + STEPS} of {2 + STEPS} steps" in told[-1]
    assert "--adapt 2" in result.command and "--strength 0.5" in result.command
    seen = []
    with pytest.raises(Stopped):
        for values in edit(view, files["a"], files["a2"], [files["b"]], "a frame", adapt=60, tab="stops"):
            seen.append(values[view.status])
            if "Adapting" in seen[-1]:
                view.studio.runner.stop("stops")
    assert len(seen) < 30


def test_the_command_line_is_one_that_edit_takes(view, edited):
    from lorweb_jax.edit import parse

    words = shlex.split(edited[view.command])
    assert words[:3] == ["python", "-m", "lorweb_jax.edit"]
    args = parse(words[3:])
    assert (args.steps, args.seed, args.max_size, args.apply) == (STEPS, 0, 64, "low-rank")
    assert (args.pipeline, args.basis) == (golden_dir() / "tiny_pipeline", golden_dir() / "basis_a.safetensors")


def refused(call):
    """The sentence that the page shows."""
    with pytest.raises(gr.Error) as caught:
        call()
    assert "\n" not in caught.value.message and not caught.value.print_exception
    return caught.value.message


def test_mistakes_are_sentences(view, files, tmp_path):
    def sentence(*arguments, **options):
        handler = parts.sentences(view.edit)
        values = dict(
            prompt="", strength=1, steps=STEPS, guidance=2.5, true=1, negative="", seed=0, adapt=0, history=[]
        )
        values |= options
        return refused(lambda: list(handler(*arguments, *values.values(), Tab())))

    a, a2, b = files["a"], files["a2"], [files["b"]]
    huge, text, bomb = tmp_path / "huge.png", tmp_path / "text.png", tmp_path / "bomb.png"
    Image.new("RGB", (400, 300)).save(huge)
    Image.new("1", (40_000, 40_000)).save(bomb)
    text.write_text("<script>alert(1)</script>")
    assert sentence(None, a2, b) == "a is missing; upload a picture there"
    assert sentence(a, None, b) == "a′ is missing; upload a picture there"
    assert sentence(a, a2, []) == "b is missing; upload a picture there"
    assert "b has 400x300 pixels, at most 100,000" in sentence(a, a2, [str(huge)])
    assert "pixels" in sentence(a, a2, [str(bomb)])
    assert "a is not an image" in sentence(str(text), a2, b)
    assert "at most 3 are taken at once" in sentence(a, a2, 4 * b)
    assert "the seed is empty" in sentence(a, a2, b, seed=None)
    assert "seed is -1" in sentence(a, a2, b, seed=-1)
    assert "steps is 0" in sentence(a, a2, b, steps=0)
    assert "steps is 2000" in sentence(a, a2, b, adapt=2000)
    assert "negative_prompt was given and true_guidance is 1" in sentence(a, a2, b, negative="blurry")
    assert "press Edit first" in refused(lambda: parts.sentences(view.save_lora)([], 0, "diffusers", 0))
    assert str(tmp_path) not in sentence(str(text), a2, b)


def test_a_bug_s_traceback_stays_in_the_terminal():
    def broken():
        raise ZeroDivisionError("<b>secret</b>")

    with pytest.raises(gr.Error) as caught:
        parts.sentences(broken)()
    assert "secret" not in caught.value.message and caught.value.print_exception


@pytest.mark.parametrize("names", ["diffusers", "kohya", "comfyui"])
def test_the_lora_is_the_api_s(view, pipeline, images, edited, names, tmp_path):
    path = view.save_lora(edited[view.history], 0, names, 2)
    mix = pipeline.coefficients(*(images[name] for name in ("a", "a2", "b")))
    pipeline.save_lora(tmp_path / "lora.safetensors", mix, names=names, rank=2)
    assert open(path, "rb").read() == (tmp_path / "lora.safetensors").read_bytes()


def test_a_style_is_the_api_s(studio, pipeline, files, images, tmp_path):
    """An analogy's LoRA as a style: uploaded, and of the command line; on text and on a picture."""
    path, words = tmp_path / "ink.safetensors", "in ink"
    pipeline.save_lora(path, pipeline.coefficients(images["a"], images["a2"], images["b"]))
    style = pipeline.style(path, 2, words)
    with gr.Blocks():
        view = StyleView(dataclasses.replace(studio, styles={"styles/ink.safetensors": style}))
    for picture in (None, files["c"]):
        uploaded = (None, 6, "") if picture else (str(path), 3, words)
        strengths = [1.5] if picture else [0]
        *_, last = view.draw("a dog", picture, *uploaded, STEPS, 1, 2, "", 5, Tab(), *strengths)
        styles = [dataclasses.replace(style, strength=strengths[0] or 3)]
        options = {"steps": STEPS, "guidance": 1, "true_guidance": 2, "seed": 5, "max_size": 64}
        with pipeline.session(use_basis=False, styles=styles) as session:
            expected = session.generate("a dog", picture and images["c"], callback=lambda *_: None, **options)
        np.testing.assert_array_equal(np.asarray(last[view.result]), expected)
        name = "styles/ink.safetensors:1.5:in ink" if picture else "ink.safetensors:3:in ink"
        assert f"--style '{name}'" in last[view.command] and ("--image c.png" in last[view.command]) == bool(picture)
    draw = parts.sentences(view.draw)
    rest = STEPS, 1, 2, "", 5, Tab(), 0
    assert "write what to draw" in refused(lambda: list(draw(" ", None, None, 6, "", *rest)))
    (tmp_path / "text.safetensors").write_text("x")
    said = refused(lambda: list(draw("a", None, str(tmp_path / "text.safetensors"), 6, "", *rest)))
    assert "text.safetensors" in said and str(tmp_path) not in said


def test_mixes_are_weighted_sums(studio, pipeline, files, images, tmp_path):
    """A card of two pairs at weight 1, and a saved mix at −0.5; a path's ends are the two analogies; a grid's captions
    are its weights; what is written is read again."""
    a, a2, b, c = (images[name] for name in ("a", "a2", "b", "c"))
    other = pipeline.coefficients(c, a, b)
    pipeline.save_mix(tmp_path / "other.safetensors", other)
    with gr.Blocks():
        view = MixView(studio)
    empty = [[], [], None, 0]
    first = [[files["a"], files["c"]], [files["a2"], files["b"]], None, 1]
    cards = [*first, [], [], str(tmp_path / "other.safetensors"), -0.5, *empty, *empty]
    rest = (STEPS, 2.5, 1, "", 3)

    def shown(handler, count=3):
        return list(handler(files["b"], "a frame", *rest, count, 0, 1, Tab(), *cards))[-1]

    def expected(mix):
        options = {"steps": STEPS, "seed": 3, "folded": False, "max_size": 64, "callback": lambda *_: None}
        return pipeline.edit(a, a2, b, "a frame", mix=mix, **options)

    mix = pipeline.coefficients(a, a2, b, more_pairs=[(c, b)])
    last = shown(view.one)
    [(picture, caption)] = last[view.results]
    np.testing.assert_array_equal(np.asarray(picture), expected(mix + -0.5 * other))
    assert caption == "1 x 1 + -0.5 x 2" and "Done." in last[view.status]
    for name in ("saved mix", "diffusers"):
        file = view.write(last[view.mix], "a frame", name)
        if name == "saved mix":
            saved = pipeline.load_mix(file)
            assert saved.prompt == "a frame"
            for path, values in (mix + -0.5 * other).coefficients.items():
                np.testing.assert_array_equal(saved.mix.coefficients[path], values)
        else:
            pipeline.save_lora(tmp_path / "lora.safetensors", mix + -0.5 * other)
            assert open(file, "rb").read() == (tmp_path / "lora.safetensors").read_bytes()
    path = shown(view.along)[view.results]
    assert [caption for _, caption in path] == ["0", "0.5", "1"]
    for (picture, _), end in zip(path[::2], (mix, other)):
        np.testing.assert_array_equal(np.asarray(picture), expected(end))
    grid = shown(view.over, count=2)[view.results]
    assert [caption for _, caption in grid] == ["0, 0", "0, 1", "1, 0", "1, 1"]

    def said(handler, *cards, b=files["b"]):
        return refused(lambda: list(parts.sentences(handler)(b, "", *rest, 3, 0, 1, Tab(), *cards)))

    assert "0 cards hold an analogy" in said(view.one, *(4 * empty))
    assert "1 cards hold an analogy, 2 or more" in said(view.along, *first, *(3 * empty))
    assert "b is missing" in said(view.one, *cards, b=None)
    assert "card 1 has 1 pictures before the edit and 0 after" in said(
        view.one, [files["a"]], [], None, 1, *(3 * empty)
    )
    saved = [[], [], str(tmp_path / "other.safetensors"), 1]
    assert "upload one on any card" in said(view.one, *saved, *(3 * empty))
    pipeline.save_lora(tmp_path / "no.safetensors", other)
    words = said(view.one, *first, [], [], str(tmp_path / "no.safetensors"), 1, *(2 * empty))
    assert words.startswith("the file of card 2 is no saved mix") and str(tmp_path) not in words
    foreign = dataclasses.replace(other, basis="another")
    write_mix(tmp_path / "foreign.safetensors", foreign)
    words = said(view.one, *first, [], [], str(tmp_path / "foreign.safetensors"), 1, *(2 * empty))
    assert "the file of card 2 is a mix of another basis" in words
    assert "press Mix first" in refused(lambda: parts.sentences(view.write)(None, "", "saved mix"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks of three pairs: pictures made redder, and mirrored."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for task, change in (("red", lambda x: np.maximum(x, [255, 0, 0])), ("mirror", lambda x: x[:, ::-1])):
        for number in range(3):
            before = random.integers(0, 256, (32, 32, 3), np.uint8)
            for part, image in (("before", before), ("after", change(before).astype(np.uint8))):
                write_image(root / task / part / f"{number}.png", image)
    return root


def test_a_look_inside(studio, pipeline, images, data, view):
    """The distance of an analogy's coefficients to a task's mean, in numpy; a training analogy's own dot is at its
    place on the plane; choosing a dot loads its images."""
    mix = pipeline.coefficients(images["a"], images["a2"], images["b"])
    result = Result(images["b"], images["b"], mix, "", 1.0, 0, "")
    with gr.Blocks(), gr.Tabs() as tabs, gr.Tab("Look inside"):
        look = LookView(dataclasses.replace(studio, data=data), view, tabs, "edit")
    shown = {}
    for values in look.look([result], 0, Tab()):
        shown |= values
    atlas = look.atlas
    assert len(atlas.analogies) == 6 and shown[look.map].count('role="button"') == 6
    mixes = {task: [] for task in ("mirror", "red")}
    for analogy in atlas.analogies:
        mixes[analogy.task].append(pipeline.coefficients(*analogy.read()[:3]))
    place = atlas.place(mix)
    for task, distance in place.nearest:
        mean = sum(mixes[task]) / len(mixes[task])
        squares = [((mix.coefficients[path] - c) ** 2).sum(-1) for path, c in mean.coefficients.items()]
        assert distance == pytest.approx(np.sqrt(np.concatenate(squares).mean()), rel=1e-4)
    assert shown[look.nearest].index(place.nearest[0][0]) < shown[look.nearest].index(place.nearest[1][0])
    own = atlas.place(mixes["red"][-1])
    np.testing.assert_allclose(own.plane[-1], own.plane[5], atol=1e-5)
    for path, c in mix.coefficients.items():
        assert f"member 0: {(np.abs(c) / np.abs(c).sum(-1, keepdims=True))[:, 0].mean():.3f}" in shown[look.members], (
            path
        )
    loaded = look.load(gr.EventData(None, {"index": 4}))
    a, a2, b, _ = atlas.analogies[4].read()
    for component, image in ((view.a, a), (view.a2, a2)):
        np.testing.assert_array_equal(np.asarray(loaded[component]), image)
    np.testing.assert_array_equal(np.asarray(loaded[view.b][0]), b)
    for event in ({"index": 99}, {"index": "x"}, None):
        refused(lambda event=event: parts.sentences(look.load)(gr.EventData(None, event)))
    refused(lambda: list(parts.sentences(look.look)([], 0, Tab())))


def test_the_runner_runs_one_at_a_time_and_stops_what_nobody_wants():
    runner, running, most = Runner(), [], []

    def work(tell):
        running.append(1)
        most.append(len(running))
        try:
            for i in range(3):
                time.sleep(0.005)
                tell(i)
            return "result"
        finally:
            running.pop()

    def take(tab, results):
        results.append(list(runner.stream(tab, work)))

    results: list = []
    threads = [threading.Thread(target=take, args=(f"tab {i}", results)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[0, 1, 2, Finished("result")]] * 8 and max(most) == 1

    steps = []

    def endless(tell):
        while True:
            time.sleep(0.001)
            steps.append(1)
            tell(len(steps))

    for end in (lambda tab, stream: stream.close(), lambda tab, _: runner.stop(tab), lambda tab, _: runner.leave(tab)):
        stream = runner.stream("tab", endless)
        next(stream)
        end("tab", stream)
        with pytest.raises((Stopped, StopIteration)):
            while True:
                next(stream)
        assert list(runner.stream("another", lambda tell: 5)) == [Finished(5)]  # the device is free again
        count = len(steps)
        time.sleep(0.02)
        assert len(steps) == count
    with pytest.raises(Stopped):
        next(runner.stream("tab", work))  # it has left


def test_a_closed_tab_ends_its_sampling(view, files):
    shown = edit(view, files["a"], files["a2"], [files["b"]], steps=200, tab="closing")
    seen = []
    with pytest.raises(Stopped):
        for values in shown:
            seen.append(values)
            if len(seen) == 4:
                view.studio.runner.leave("closing")
    assert len(seen) < 100
    assert view.studio.runner._device.acquire(timeout=PATIENCE / 1000)
    view.studio.runner._device.release()


@pytest.fixture(scope="module")
def client(address):
    """A new tab that calls what the page's buttons call."""
    module = pytest.importorskip("gradio_client")
    options = {"verbose": False, "download_files": False, "httpx_kwargs": {"timeout": PATIENCE / 1000}}
    return lambda: module.Client(address, **options)


@pytest.fixture(scope="module")
def payload(files):
    """Pictures as an upload of one takes them, and as one of several does."""
    module = pytest.importorskip("gradio_client")
    one = {name: module.handle_file(path) for name, path in files.items()}
    return one, {name: [{"image": file, "caption": None}] for name, file in one.items()}


def served(result) -> bytes:
    """What the page serves of a file that it made."""
    return httpx.get(result["url"]).content


def test_two_tabs_each_get_their_own(client, payload, pipeline, images):
    """Through HTTP, at once; each has the result of its own seed, and its own history."""
    one, several = payload
    results = {}

    def edit(seed):
        job = client().submit(one["a"], one["a2"], several["b"], "", 1, STEPS, 2.5, 1, "", seed, api_name="/edit")
        results[seed] = job.result(timeout=PATIENCE / 1000)

    threads = [threading.Thread(target=edit, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        expected = pipeline.edit(
            *(images[name] for name in ("a", "a2", "b")), folded=False, max_size=64, steps=STEPS, seed=seed,
            callback=lambda *_: None,
        )  # fmt: skip
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(served(result[2])))), expected)
        assert len(result[-1]) == 1


@pytest.fixture(scope="module")
def velocity(pipeline):
    """The transformer's velocity with a mix, and that of diffusers' with a LoRA's file, for recorded inputs."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    case = np.load(golden_dir() / "case_a.npz")
    recorded = {name: case[name][:1] if name not in ("img_ids", "txt_ids") else case[name] for name in INPUTS}
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(golden_dir() / "tiny_pipeline" / "transformer").eval()
    parts = "scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2".split()
    whole = diffusers.FluxKontextPipeline(transformer=theirs, **dict.fromkeys(parts))

    def of_mix(mix):
        adapters = pipeline.model.basis.adapters({path: c[:, None] for path, c in mix.coefficients.items()})
        return np.asarray(pipeline.model.transformer(*recorded.values(), adapters))

    def of_lora(path):
        whole.load_lora_weights(path.parent, weight_name=path.name)
        with torch.no_grad():
            output = theirs(**{name: torch.tensor(x) for name, x in recorded.items()}, return_dict=False)[0].numpy()
        whole.unload_lora_weights()
        return output

    return of_mix, of_lora


def require_lora_of(mix, data, pipeline, velocity, folder):
    """That the bytes of a LoRA are the API's of this mix, and that diffusers computes with it what the mix does."""
    (folder / "page.safetensors").write_bytes(data)
    pipeline.save_lora(folder / "api.safetensors", mix)
    assert data == (folder / "api.safetensors").read_bytes()
    of_mix, of_lora = velocity
    assert relative(of_lora(folder / "page.safetensors"), of_mix(mix)) <= 1e-5
    assert relative(of_mix(0 * mix), of_mix(mix)) > 1e-3


def test_edits_are_timed_and_crowds_served(client, studio, address, files):
    from measure_studio import crowd, latencies

    setting = [files[name] for name in ("a", "a2", "b")], "", STEPS
    times = latencies(studio, address, *setting, repeats=1)
    assert 0 < times["api"] and times["ratio"] == times["page"] / times["api"]
    told = crowd(address, *setting, tabs=3)
    assert (told["results"], told["different"]) == (3, 3) and told["most"] >= told["before"] > 100


def test_what_the_buttons_call_without_a_browser(client, payload, studio, pipeline, images, velocity, tmp_path):
    """Edit at strength 0.5 and its LoRA, a mix of two cards as saved mix, a style; cancelling ends the sampling."""
    (one, several), tab = payload, client()
    rest = (STEPS, 2.5, 1, "", 0)
    tab.predict(one["a"], one["a2"], several["b"], "a frame", 0.5, *rest, api_name="/edit")
    mix = 0.5 * pipeline.coefficients(*(images[name] for name in ("a", "a2", "b")))
    lora = tab.predict("diffusers", 0, api_name="/lora")
    require_lora_of(mix, served(lora), pipeline, velocity, tmp_path)
    cards = [several["a"], several["a2"], None, 1, several["c"], several["a"], None, -0.5, *(2 * ([], [], None, 0))]
    result = tab.predict(one["b"], "a frame", *rest, 3, 0, 1, *cards, api_name="/mix")
    both = pipeline.coefficients(images["a"], images["a2"], images["b"]) + -0.5 * pipeline.coefficients(
        images["c"], images["a"], images["b"]
    )
    options = {"steps": STEPS, "folded": False, "max_size": 64, "callback": lambda *_: None}
    expected = pipeline.edit(images["a"], images["a2"], images["b"], "a frame", mix=both, **options)
    [shown] = result[1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(served(shown["image"])))), expected)
    (tmp_path / "mix.safetensors").write_bytes(served(tab.predict("a frame", "saved mix", api_name="/save_mix")))
    for path, c in pipeline.load_mix(tmp_path / "mix.safetensors").mix.coefficients.items():
        np.testing.assert_array_equal(c, both.coefficients[path])
    drawn = tab.predict("a dog", None, None, 6, "", STEPS, 1, 2, "", 5, api_name="/style")
    plain = pipeline.session(use_basis=False).generate(
        "a dog", steps=STEPS, guidance=1, true_guidance=2, seed=5, max_size=64, callback=lambda *_: None
    )
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(served(drawn[1])))), plain)
    job = tab.submit(one["a"], one["a2"], several["b"], "", 1, 100, *rest[1:], api_name="/edit")
    wait(lambda: studio.runner._device.locked())
    job.cancel()
    wait(lambda: not studio.runner._device.locked())


def wait(done) -> None:
    for _ in range(PATIENCE // 100):
        if done():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def test_nothing_of_the_machine_is_served(address, files, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in ("/etc/passwd", f"{root}/README.md", "README.md", str(secret), files["a"], "/proc/self/environ",
                 f"{root}/../", "..%2f..%2fetc%2fpasswd"):  # fmt: skip
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404), path
    for url in ("http://127.0.0.1:1/", "https://example.com/"):
        assert httpx.get(f"{address}gradio_api/proxy={url}").status_code in (400, 403, 404, 405)
    # A path in the place of an upload is refused too.
    join = httpx.post(
        f"{address}gradio_api/call/edit",
        json={
            "data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, None, [], "", 1, 1, 1, 1, "", 0, 0]
        },
    )
    event = join.json()["event_id"]
    answer = httpx.get(f"{address}gradio_api/call/edit/{event}", timeout=PATIENCE / 1000).text
    assert "event: error" in answer and "secret" not in answer.replace("secret.txt", "")
    assert httpx.get(f"{address}gradio_api/monitoring/summary").status_code in (401, 403, 404)


def test_uploads_are_limited(address):
    for size, status in ((LIMITS.nbytes // 2, 200), (LIMITS.nbytes + 10_000, 413)):
        answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("x.png", b"0" * size)})
        assert answer.status_code == status


def test_a_port_in_use_leads_to_the_next(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert port < pages.free_port("127.0.0.1", port) <= port + pages.PORTS
    with pytest.raises(Exception, match="can't be served at 203.0.113.1"):
        pages.free_port("203.0.113.1", 7860)


def test_without_arguments_the_default_run_comes_first(tmp_path, monkeypatch, capsys):
    """A run that is missing is trained, one that was broken off goes on, one that has ended is taken. The command that
    is run is called here without a process of its own."""
    import line_job

    from lorweb_jax.main import read_config
    from lorweb_jax.training.loop import train

    config, workdir, last = Path(line_job.__file__), tmp_path / "runs" / "basis", 7
    draw = line_job.Points.__next__

    def points(self):
        if self.position == last:
            raise KeyboardInterrupt
        return draw(self)

    def run(words):
        assert words == [sys.executable, "-m", "lorweb_jax.main", f"--config={config}", f"--workdir={workdir}"]
        try:
            train(read_config(str(config)), workdir, line_job.make)
        except KeyboardInterrupt:
            return 130
        return 0

    monkeypatch.setattr(line_job.Points, "__next__", points)
    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "RUN", workdir)
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "nowhere.py")
    with pytest.raises(UserError, match="no trained basis in .* start this in the repository's root, or give --basis"):
        demo.default_basis(demo.SMALL_BASE)
    monkeypatch.setattr(demo, "CONFIG", config)
    with pytest.raises(UserError, match="ended early; the same command goes on from its last checkpoint"):
        demo.default_basis(demo.SMALL_BASE)
    last = -1
    assert demo.default_basis(demo.SMALL_BASE) == workdir
    said = capsys.readouterr().out
    assert "has 5 of its 24 steps; it goes on first" in said and "going on from step 5" in said
    assert demo.default_basis(demo.SMALL_BASE) == workdir and not capsys.readouterr().out
    assert demo.default_basis(golden_dir() / "tiny_pipeline") is None


def test_whoever_stops_the_command_stops_its_training():
    """SIGTERM reaches the process that trains, which ends in its own way; its exit status is told."""
    child = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(7))
print("here", flush=True)
time.sleep(60)
"""
    parent = f"import sys; from lorweb_jax import demo; sys.exit(demo._run([sys.executable, '-c', {child!r}]) + 1)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.terminate()
        assert process.wait(PATIENCE / 1000) == 8


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_in_a_browser(browser, address, studio, pipeline, files, images, velocity, tmp_path):
    """Upload, edit, move the strength, edit again; the LoRA; an earlier result brought back; Stop; a mix of two
    analogies and its LoRA. Nothing is asked of any other machine."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.set_default_timeout(PATIENCE)
    asked = set()
    tab.on("request", lambda request: asked.add(request.url.split("/")[2]))
    tab.goto(address)

    def upload(field, name):
        tab.locator(f"#{field} input[type=file]").set_input_files(files[name])
        tab.locator(f"#{field} img").first.wait_for()

    def downloaded(field):
        with tab.expect_download() as download:
            tab.locator(f"#{field} a").first.click()
        return open(download.value.path(), "rb").read()

    edit = tab.get_by_role("button", name="Edit", exact=True)
    edit.wait_for()
    for name in ("a", "a2", "b"):
        upload(f"edit_{name}", name)
    tab.get_by_role("button", name="Sampling").click()
    steps = tab.get_by_label("number input for Steps").first
    steps.fill(str(STEPS))
    tab.locator("#edit_prompt textarea").fill("a frame")
    edit.click()
    tab.locator("#edit_history img").first.wait_for()

    tab.locator("#edit_strength input[type=range]").focus()
    for _ in range(10):
        tab.keyboard.press("ArrowLeft")
    tab.locator("#edit_prompt textarea").fill("half a frame")
    edit.click()
    tab.locator("#edit_history img").nth(1).wait_for()
    tab.locator("#edit_status", has_text="Done.").wait_for()
    tab.get_by_role("button", name="Take it elsewhere").click()
    command = tab.locator("#edit_command textarea")
    assert "--strength 0.5" in command.input_value() and "'half a frame'" in command.input_value()
    tab.locator("#edit_lora").click()
    mix = 0.5 * pipeline.coefficients(*(images[name] for name in ("a", "a2", "b")))
    require_lora_of(mix, downloaded("edit_lora_file"), pipeline, velocity, tmp_path)

    tab.locator("#edit_history button:has(img)").nth(1).click()
    wait(lambda: tab.locator("#edit_prompt textarea").input_value() == "a frame")
    assert "--strength" not in command.input_value()
    assert tab.get_by_label("number input for Strength").first.input_value() == "1"

    steps.fill("100")
    edit.click()
    tab.locator("#edit_status", has_text="of 100 steps").wait_for()
    tab.locator("#edit_stop").click()
    tab.locator("#edit_status", has_text="Stopped.").wait_for()
    wait(lambda: not studio.runner._device.locked())
    assert tab.locator("#edit_history img").count() == 2

    tab.get_by_role("tab", name="Mix").click()
    for card, (before, after) in enumerate((("a", "a2"), ("c", "a"))):
        upload(f"mix_before_{card}", before)
        upload(f"mix_after_{card}", after)
    upload("mix_b", "b")
    tab.get_by_label("number input for Weight of 2").fill("-0.5")
    tab.get_by_role("button", name="Sampling").click()
    tab.get_by_label("number input for Steps").locator("visible=true").fill(str(STEPS))
    tab.locator("#mix_run").click()
    tab.locator("#mix_results img").first.wait_for()
    tab.locator("#mix_status", has_text="Done.").wait_for()
    tab.get_by_role("button", name="Keep the mix").click()
    tab.get_by_label("As", exact=True).click()
    tab.get_by_role("option", name="diffusers").click()
    tab.locator("#mix_save").click()
    both = pipeline.coefficients(images["a"], images["a2"], images["b"]) + -0.5 * pipeline.coefficients(
        images["c"], images["a"], images["b"]
    )
    require_lora_of(both, downloaded("mix_file"), pipeline, velocity, tmp_path)

    assert asked == {address.split("/")[2]}
    tab.close()
    wait(lambda: studio.runner._closed)  # the server learns of it
