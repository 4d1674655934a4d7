"""Sessions: a mix folded once for many images. Callbacks, classifier-free guidance, generation without an analogy; how
these agree with diffusers stands in test_small_base.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from golden import golden_dir

from lorweb_jax import Pipeline, UserError
from lorweb_jax.flow.sampling import TrueGuidance, euler
from lorweb_jax.pipeline import session as sessions
from lorweb_jax.pipeline.request import edit_request, generation_request
from lorweb_jax.pipeline.stages import stages, texts

FOLDER = golden_dir() / "tiny_pipeline"


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden_dir() / "e2e_square.npz")


@pytest.fixture(scope="module")
def base():
    return Pipeline.load(FOLDER)


@pytest.fixture(scope="module")
def pipeline(base):
    return base.attach(golden_dir() / "basis_a.safetensors")


@pytest.fixture(scope="module")
def analogy(recorded):
    return tuple(recorded[name] for name in ("image_a", "image_atag", "image_b"))


@pytest.fixture(scope="module")
def mix(pipeline, analogy):
    return pipeline.coefficients(*analogy)


@pytest.fixture(scope="module")
def lora(base, pipeline, mix, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    pipeline.save_lora(path, mix)
    return base.attach(path)


def apart(one, other):
    """Levels of 255."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def test_a_callback_sees_the_recorded_latents_of_every_step(pipeline, analogy, recorded):
    """Errors add up over four steps: 1e-4 of the latents' norm. The result is the one without a callback."""
    seen = []
    options = dict(guidance=float(recorded["guidance_scale"]), steps=4, noise=recorded["latents_packed"], folded=False)
    prompt = str(recorded["prompt"])
    result = pipeline.edit(*analogy, prompt, callback=lambda *step: seen.append(step), **options)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    for step, latents in seen:
        assert relative(latents, recorded[f"step{step}/latents_after"]) <= 1e-4
    assert apart(result, pipeline.edit(*analogy, prompt, **options)) <= 1


def test_previews_are_the_results_of_a_constant_velocity(pipeline, analogy, recorded):
    """z' − σ'·v in numpy, of diffusers' latents and noise levels, whose v is (z' − z) / (σ' − σ); decoded by the
    autoencoder, and its b′ cut out. 1 of 255 for rounding. The result is the one without previews."""
    seen, prompt = [], str(recorded["prompt"])
    options = dict(guidance=float(recorded["guidance_scale"]), steps=4, noise=recorded["latents_packed"], folded=False)
    result = pipeline.edit(*analogy, prompt, preview=lambda *step: seen.append(step), preview_every=2, **options)
    assert [step for step, _ in seen] == [1]
    before, after = (recorded[f"step{step}/latents_after"].astype(np.float64) for step in (0, 1))
    now, then = pipeline.folder.schedule.sigmas(4, before.shape[1])[1:3].astype(np.float64)
    clean = after - then * (after - before) / (then - now)
    height, width = (2 * side for side in result.shape[:2])
    image = np.asarray(pipeline.model.images(jnp.asarray(clean, jnp.float32), height, width))[0]
    expected = np.round(np.clip(image / 2 + 0.5, 0, 1) * 255)[height // 2 :, width // 2 :]
    [shown] = seen[0][1]
    assert shown.shape == result.shape and apart(shown, expected) <= 1
    assert apart(shown, result) > 1
    assert apart(result, pipeline.edit(*analogy, prompt, **options)) <= 1


def test_what_a_callback_raises_ends_the_sampling(pipeline, analogy):
    seen = []

    def stop(step, latents):
        seen.append(step)
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.edit(*analogy, steps=9, callback=stop)
    assert seen == [0, 1]


def test_a_session_folds_once_and_frees_its_weights(pipeline, analogy, mix, monkeypatch):
    a, a2, b = analogy
    folds, fold = [], sessions.fold
    monkeypatch.setattr(sessions, "fold", lambda *arguments: folds.append(1) or fold(*arguments))
    before = pipeline.edit(a, a2, b, steps=2, folded=False)
    with pipeline.session(mix) as session:
        one = session.edit(a, a2, b, steps=2)
        two = session.edit_batch([(a, a2, b), (a, a2, a)], ["", "a frame"], steps=2)
        kernels = session._own
        assert len(folds) == 1
        assert session.nbytes == sum(
            4 * layer.a.shape[0] * layer.a.shape[2] * layer.b.shape[3] for layer in pipeline.model.basis.layers.values()
        )
    assert all(kernel.is_deleted() for kernel in kernels) and session.nbytes == 0
    assert apart(one, before) <= 1 and apart(two[0], before) <= 1
    assert apart(two[1], two[0]) > 1
    # The pipeline's own weights are as they were.
    np.testing.assert_array_equal(pipeline.edit(a, a2, b, steps=2, folded=False), before)
    for use in (lambda: session.edit(a, a2, b, steps=1), session.__enter__):
        with pytest.raises(UserError, match="session is closed"):
            use()


def test_unstacked_blocks_make_the_same_image(pipeline, analogy, mix):
    unstacked = Pipeline.load(FOLDER, unstacked=True).attach(golden_dir() / "basis_a.safetensors")
    with unstacked.session(mix) as session, pipeline.session(mix) as stacked:
        assert apart(session.edit(*analogy, steps=2), stacked.edit(*analogy, steps=2)) <= 1
        assert session.nbytes == stacked.nbytes and len(session._own) > len(stacked._own)


def test_an_edit_leaves_no_folded_weights(pipeline, analogy):
    pipeline.edit(*analogy, steps=1, folded=True)
    held = sum(array.nbytes for array in jax.live_arrays())
    pipeline.edit(*analogy, steps=1, folded=True)
    assert sum(array.nbytes for array in jax.live_arrays()) == held


def test_sessions_without_folding(pipeline, base, analogy, mix):
    with pipeline.session(mix, folded=False) as session:
        assert session.nbytes == 0
        np.testing.assert_array_equal(
            session.edit(*analogy, steps=2), pipeline.edit(*analogy, steps=2, mix=mix, folded=False)
        )
    with pipeline.session(use_basis=False) as session:
        np.testing.assert_array_equal(session.edit(*analogy, steps=2), base.edit(*analogy, steps=2))


def test_true_guidance_of_a_batch_of_analogies(pipeline, analogy):
    """Coefficients by row and by pass: as each analogy alone with its own mix folded."""
    a, a2, b = analogy
    options = dict(steps=2, true_guidance=2.5, negative_prompt="blurry", noise=None)
    analogies = [(a, a2, b), (a[::-1], a2, b)]
    together = pipeline.edit_batch(analogies, ["a frame", ""], **options)
    noise = edit_request(pipeline.folder, analogies, ["", ""], {})[1].noise
    for i, prompt in enumerate(("a frame", "")):
        alone = pipeline.edit(*analogies[i], prompt, folded=True, **options | {"noise": noise[i : i + 1]})
        assert apart(together[i], alone) <= 1
    assert apart(together[0], pipeline.edit(*analogies[0], "a frame", steps=2)) > 1


def test_passes_that_are_not_needed_are_not_run(base):
    def passes(**sampling):
        request = generation_request(base.folder, ["one", "two"], None, sampling, (64, 64))
        [stage] = stages(request.sampling)
        return [line for shown in stage.passes for line in texts(request, [], shown)], stage.combine

    for scale, lines in ((1, ["one", "two"]), (0, ["bad", "bad"]), (3, ["one", "two", "bad", "bad"])):
        negative = {"negative_prompt": "bad"} if scale != 1 else {}
        found, combine = passes(true_guidance=scale, **negative)
        assert found == lines and 2 * combine.passes == len(lines)
    assert passes(true_guidance=2.0)[0][2:] == ["", ""]


def test_guidance_is_a_formula_and_ranges_of_levels_compose():
    """Against float64, for a velocity that differs by row; in one go and in two."""
    random = np.random.default_rng(0)
    noise, gains = random.normal(size=(2, 3, 4)), random.normal(size=(4, 1, 1))
    sigmas = np.array([1.0, 0.7, 0.2, 0.0])

    def velocity(rows, sigma):
        return jnp.asarray(gains, jnp.float32) * rows * sigma[:, None, None]

    expected = noise
    for sigma, after in zip(sigmas, sigmas[1:]):
        prompt, negative = (part * expected * sigma for part in (gains[:2], gains[2:]))
        expected = expected + (after - sigma) * (negative + 3 * (prompt - negative))
    combine = TrueGuidance(3.0)
    whole = euler(velocity, jnp.asarray(noise), sigmas.astype(np.float32), combine=combine)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)
    half = euler(velocity, jnp.asarray(noise), sigmas[:2].astype(np.float32), combine=combine)
    np.testing.assert_allclose(
        euler(velocity, half, sigmas[1:].astype(np.float32), combine=combine), expected, rtol=1e-5, atol=1e-6
    )


def test_a_lora_takes_part_in_generation(lora, base, analogy):
    """Folded and beside the weights; it was trained for nothing here, it changes the picture."""
    made = []
    for folded in (True, False):
        with lora.session(folded=folded) as session:
            made.append(session.generate("a frame", size=(64, 48), steps=2))
    assert made[0].shape == (48, 64, 3) and apart(*made) <= 1
    np.testing.assert_array_equal(made[0], lora.generate("a frame", size=(64, 48), steps=2))
    assert apart(made[0], base.generate("a frame", size=(64, 48), steps=2)) > 1


def test_sizes_of_what_is_generated(base, capsys):
    def sizes(images=None, **options):
        request = generation_request(base.folder, ["x"], images, {}, **options)
        return request.size, [image.shape[1:3] for image in request.references], request.noise.shape

    image = np.zeros((50, 70, 3), np.uint8)
    assert sizes([image]) == ((48, 64), [(48, 64)], (1, 12, 64))
    assert sizes([image], max_size=40) == ((16, 32), [(16, 32)], (1, 2, 64))
    assert sizes([[image, image[:20]]], size=(32, 64)) == ((64, 32), [(48, 64), (16, 64)], (1, 8, 64))
    assert sizes(size=(40, 33)) == ((32, 32), [], (1, 4, 64))
    assert sizes(max_size=40) == ((32, 32), [], (1, 4, 64)) and sizes()[0] == (1024, 1024)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "the image is resized from 70x50 to 64x48 pixels: the model works on multiples of 16"
    assert "32x32 pixels, not 40x33" in told[-1]


@pytest.mark.parametrize(
    "said, prompts, images, options",
    [
        ("the prompts are 'text'", "text", None, {}),
        ("no prompts", [], None, {}),
        ("the size is 64; give", ["x"], None, {"size": 64}),
        ("the width is 8", ["x"], None, {"size": (8, 64)}),
        ("the height is 99999", ["x"], None, {"size": (64, 99999)}),
        ("the images are 2 and there are 1 prompts", ["x"], [np.zeros((16, 16, 3), np.uint8)] * 2, {}),
        ("the image is a path", ["x"], ["b.png"], {}),
        ("the image 1 is an array", ["x"], [[np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16))]], {}),
        ("have 1, 0 reference images", ["x", "y"], [[np.zeros((16, 16, 3), np.uint8)], []], {}),
        (
            "have different sizes, 16x16, 32x16; give them one by one",
            ["x", "y"],
            [np.zeros((16, n, 3), np.uint8) for n in (16, 32)],
            {},
        ),
        ("the image is 8x99 pixels, at least 16x16", ["x"], [np.zeros((99, 8, 3), np.uint8)], {}),
        ("negative_prompt was given and true_guidance is 1", ["x"], None, {"negative_prompt": "y"}),
        ("negative_prompt is 5", ["x"], None, {"negative_prompt": 5, "true_guidance": 2}),
        ("true_guidance is -1", ["x"], None, {"true_guidance": -1}),
        ("the callback is a int", ["x"], None, {"callback": 5}),
        ("round_to_bfloat16 is 'yes'", ["x"], None, {"round_to_bfloat16": "yes"}),
        ("the noise is", ["x"], None, {"noise": np.zeros((1, 3, 64)), "size": (64, 64)}),
    ],
)
def test_bad_generations(base, said, prompts, images, options):
    with pytest.raises(UserError, match=said) as caught:
        base.generate_batch(prompts, images, **options)
    assert "\n" not in str(caught.value)


def test_bad_sessions(pipeline, base, mix):
    with pytest.raises(UserError, match="chooses its mix by an analogy"):
        pipeline.session()
    with pytest.raises(UserError, match="chooses its mix by an analogy"):
        pipeline.generate("x", size=(64, 64))
    with pytest.raises(UserError, match="no basis is attached"):
        base.session(mix)
    with pytest.raises(UserError, match="leave one of them out"):
        pipeline.session(mix, use_basis=False)
    internal = base.attach(golden_dir() / "basis_e.safetensors")
    with internal.session() as session, pytest.raises(UserError, match="has none of; edit an analogy"):
        session.generate("x", size=(64, 64))


def test_parts_have_names_in_profiles(base):
    """What a trace shows: lowered, not compiled."""

    def whole(model, images, ids):
        text, pooled = model.prompt(*ids)
        references, noise = model.tokens(images), jnp.zeros((1, 4, 64))
        z = model.sample(noise, references, text, pooled, jnp.float32(1), jnp.array([1.0, 0.0]), (32, 32))
        return model.images(z, 32, 32)

    ids = jnp.zeros((1, 77), jnp.int32), jnp.zeros((1, 8), jnp.int32)
    lowered = jax.jit(whole).lower(base.model, jnp.zeros((1, 32, 32, 3), jnp.uint8), ids).as_text(debug_info=True)
    for name in ("text/", "encode/", "modulations/", "sampling_step/", "double_blocks/", "single_blocks/", "decode/"):
        assert name in lowered, name
