"""The full-size model's steps on one device: what they take as the code stands, and what variants of it take.

All programs are compiled first, side by side, from shapes; then each is timed, and the result written as it comes.
Random weights; one set of them serves all steps. `--tiny` rehearses on any machine.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(folder) for folder in list(Path(__file__).resolve().parents)[2::-1]]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from variants import POLICIES, applied  # noqa: E402

from benchmark import ceilings, ours  # noqa: E402
from benchmark.random_weights import inputs, normal, random_basis, random_flux  # noqa: E402
from benchmark.setting import DEFAULTS, Setting  # noqa: E402
from lorweb_jax.adapters.mixture import LowRankAdapter  # noqa: E402
from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.models.flux1.model import Flux  # noqa: E402
from lorweb_jax.nn import layers  # noqa: E402
from lorweb_jax.planning.flops import base_flops, basis_flops  # noqa: E402

START = time.monotonic()
NO_TRITON = {"xla_gpu_enable_triton_gemm": False}


def say(*words):
    print(f"[{time.monotonic() - START:6.1f}]", *words, flush=True)


class Results:
    """A JSON file that is whole after every change."""

    def __init__(self, path):
        self.path, self.values, self.lock = Path(path), {}, threading.Lock()

    def put(self, section, name, value):
        with self.lock:
            self.values.setdefault(section, {})[name] = value
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.values, indent=1) + "\n")
            partial.replace(self.path)
        say(section, name, value)


def setting_of(args, what, **changes):
    size = "tiny" if args.tiny else "kontext"
    tokens, text, batch, remat, unroll = DEFAULTS[size, what]
    if args.tiny:
        unroll = 1
    values = dict(
        size=size,
        what=what,
        dtype="float32" if args.tiny else "bfloat16",
        tokens=tokens,
        text_tokens=text,
        batch=batch,
        repeats=1,
        basis_size=32,
        basis_rank=4,
        quantization="none",
        moments="float32",
        remat=remat,
        unroll=unroll,
        attention="xla" if args.tiny else "cudnn",
        threads=1,
    )
    return Setting(**values | changes)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def graph(setting):
    """(graphdef, state's shapes) of the transformer, weights in the setting's dtype."""
    graphdef, state = nnx.split(
        nnx.eval_shape(
            lambda: Flux(
                setting.model,
                remat=setting.remat,
                attention=setting.attention,
                unroll=setting.unroll,
                quantization=setting.quantization,
                rngs=nnx.Rngs(0),
            )
        )
    )

    def cast(leaf):
        wide = leaf.dtype == jnp.float32 and leaf.shape[-2:-1] != (1,)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(setting.dtype) if wide else leaf.dtype)

    return graphdef, jax.tree.map(cast, state)


def stacked_leaf(path):
    return any(str(getattr(key, "key", getattr(key, "name", key))).endswith("transformer_blocks") for key in path)


def unstacked_state(state, without=("norm1", "norm1_context", "norm")):
    """The state with a list of one array a block in the place of each stack but the modulations'."""

    def split(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if not stacked_leaf(path) or any(name in names for name in without):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * leaf.shape[0]
        return [leaf[index] for index in range(leaf.shape[0])]

    return jax.tree_util.tree_map_with_path(split, state)


def fp8_state(state):
    """The state with codes [l, o, i] and one scale a kernel, of a model quantised to fp8 as codes [l, i, o]."""

    def turned(path, leaf):
        if leaf.dtype == jnp.float8_e4m3fn:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((leaf.shape[0], leaf.shape[2], leaf.shape[1]), leaf.dtype)
            return jnp.swapaxes(leaf, 1, 2)
        if stacked_leaf(path) and leaf.ndim == 3 and leaf.shape[1] == 1:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((leaf.shape[0], 1, 1), leaf.dtype)
            return leaf.max(axis=2, keepdims=True)
        return leaf

    return jax.tree_util.tree_map_with_path(turned, state)


class Program:
    """A step: how it is traced, with which variants and compiler options, and what it is called with."""

    def __init__(self, section, name, setting, *, variants=(), options=None, policy=None, kind="base", flops=0):
        self.section, self.name, self.setting, self.kind = section, name, setting, kind
        self.variants, self.options, self.policy, self.flops = variants, options, policy, flops
        self.compiled = self.failed = None

    def lower(self):
        setting = self.setting
        if self.policy:
            layers.REMAT_POLICIES[self.policy] = POLICIES[self.policy]()
        with applied(self.variants):
            graphdef, state = graph(setting)
            if "fp8-tensor" in self.variants:
                state = fp8_state(state)
            given = dict(shapes(inputs_cached(setting)))
            if setting.what == "sample":
                levels = {name: given.pop(name) for name in ("pooled_bp", "timestep_b", "guidance_b")}
                del given["query"], given["target"]
                mods = mods_of(setting, levels)
                mixes = mixes_of(setting) if self.kind == "low-rank" else None
                if "unstacked" in self.variants:
                    state = unstacked_state(state)
                function, args, donate = ours.step_without_modulations(graphdef), (state, given, mods, mixes), ()
            elif self.kind == "basis":
                trainable, opt_state, optimizer = trainables(setting)
                function = ours.train_step(graphdef, setting.basis, optimizer)
                args, donate = (trainable, opt_state, state, given), (0, 1)
            else:
                function, args, donate = ours.gradients(self.kind, graphdef), (state, given), ()
            return jax.jit(function, donate_argnums=donate).lower(*args)

    def compile(self, lowered):
        start = time.monotonic()
        options = self.options if jax.default_backend() == "gpu" else None
        self.compiled = lowered.compile(compiler_options=options)
        self.compile_seconds = time.monotonic() - start
        analysis = self.compiled.memory_analysis()
        self.memory = (
            {
                name: getattr(analysis, f"{name}_size_in_bytes") / 2**30
                for name in ("argument", "output", "temp", "alias")
            }
            if analysis
            else None
        )


_INPUTS = {}


def inputs_cached(setting):
    key = setting.size, setting.what, setting.batch, setting.tokens
    if key not in _INPUTS:
        _INPUTS[key] = inputs(setting)
    return _INPUTS[key]


def mods_of(setting, levels):
    graphdef, state = graph(setting_plain(setting))
    return shapes(
        jax.eval_shape(
            lambda s, lv: nnx.merge(graphdef, s).modulations(lv["pooled_bp"], lv["timestep_b"], lv["guidance_b"]),
            state,
            levels,
        )
    )


def setting_plain(setting):
    return dataclasses.replace(setting, quantization="none", remat="none")


def mixes_of(setting):
    c = setting.basis
    S = jax.ShapeDtypeStruct
    return {
        path: LowRankAdapter(
            S((layer.depth, c.size, layer.inputs, c.rank), setting.dtype),
            S((layer.depth, c.size, c.rank, layer.outputs), setting.dtype),
            S((layer.depth, setting.batch, c.size), jnp.float32),
            c.scale,
        )
        for path, layer in setting.backbone.adapted.items()
    }


def trainables(setting):
    c, S = setting.basis, jax.ShapeDtypeStruct
    trainable = {}
    for path, layer in setting.backbone.adapted.items():
        l, i, o = layer.depth, layer.inputs, layer.outputs
        trainable |= {
            f"{path}.a": S((l, c.size, i, c.rank), jnp.float32),
            f"{path}.b": S((l, c.size, c.rank, o), jnp.float32),
            f"{path}.keys": S((l, c.size, c.key_dim), jnp.float32),
            f"{path}.projection": S((l, c.key_dim, c.query_dim), jnp.float32),
        }
    optimizer = ours.paper_optimizer(setting.moments)
    return trainable, jax.eval_shape(optimizer.init, trainable), optimizer


def seconds_of(run, budget):
    """Seconds of one call: the median of at least 3 groups of calls, after one call that warms up."""
    run(1)
    start = time.monotonic()
    run(1)
    one = time.monotonic() - start
    count = max(1, min(20, int(budget / 3 / max(one, 1e-4))))
    found = []
    for _ in range(3):
        start = time.monotonic()
        run(count)
        found.append((time.monotonic() - start) / count)
    return {"ms": [round(1000 * value, 3) for value in sorted(found)], "calls": 3 * count}


GROUPS = ("sample", "train", "ceilings", "unstacked", "fp8-tensor", "int8", "fp8")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=nonempty_path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=230, help="end after this time (default: 230)")
    parser.add_argument("--groups", default=",".join(GROUPS), help="what is measured, in this order (default: all)")
    parser.add_argument("--tiny", action="store_true", help="the small base's sizes, to rehearse on any machine")
    args = parser.parse_args()
    results, deadline = Results(args.out / "speed.json"), START + args.seconds
    device = jax.devices()[0]
    results.put("machine", "device", f"{device.device_kind}, jax {jax.__version__}, {os.cpu_count()} cores")

    sample, train = setting_of(args, "sample"), setting_of(args, "train")
    flops = base_flops("velocity", sample.backbone, sample.batch, sample.tokens, sample.text_tokens)
    sizes = (train.batch, train.tokens, train.text_tokens)
    train_flops = base_flops("basis", train.backbone, *sizes) + basis_flops(
        "basis", train.backbone, train.basis, *sizes
    )
    programs = plan(sample, train, flops, train_flops)
    making = threading.Thread(target=make_weights, args=(sample,))
    making.start()
    for group in args.groups.split(","):
        members = [program for program in programs if program.section == group]
        try:
            if group == "ceilings":
                measure_ceilings(args, results, sample, train, deadline)
                continue
            # One group after the other: the compiler times kernels on the device, and programs that are compiled or
            # run at the same time disturb it and wait for it.
            ready = compile_group(members, results, deadline)
            making.join()
            measure_group(group, ready, results, deadline, sample, args)
        except Exception as error:
            traceback.print_exc()
            results.put("failed", group, f"{type(error).__name__}: {str(error)[:300]}")
    results.put("machine", "seconds in all", round(time.monotonic() - START, 1))
    # Threads that still compile would hold the process.
    os._exit(0)


def compile_group(programs, results, deadline):
    """Those of the programs that were compiled before the deadline."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(3), {}
    for program in programs:
        if time.monotonic() > deadline - 20:
            results.put("skipped", program.name, "no time to compile it")
            continue
        try:
            waiting[pool.submit(program.compile, program.lower())] = program
        except Exception as error:
            traceback.print_exc()
            results.put("failed", program.name, f"lowering: {type(error).__name__}: {str(error)[:300]}")
    concurrent.futures.wait(waiting, timeout=max(1, deadline - 10 - time.monotonic()))
    pool.shutdown(wait=False, cancel_futures=True)
    ready = []
    for future, program in waiting.items():
        if not future.done() or future.cancelled():
            results.put("skipped", program.name, "still compiling at the deadline")
        elif future.exception():
            error = future.exception()
            results.put("failed", program.name, f"compiling: {type(error).__name__}: {str(error)[:300]}")
        else:
            results.put(
                "compile",
                f"{program.section} {program.name}",
                {"seconds": round(program.compile_seconds, 1), "GiB": program.memory},
            )
            ready.append(program)
    return ready


def plan(sample, train, flops, train_flops):
    """Every program of the session, those of a group in the order of what they tell."""

    def s(name, section="sample", **more):
        setting = dataclasses.replace(sample, **more.pop("change", {}))
        return Program(section, name, setting, flops=flops, **more)

    def t(name, **more):
        setting = dataclasses.replace(train, **more.pop("change", {}))
        return Program("train", name, setting, kind=more.pop("kind", "basis"), flops=train_flops, **more)

    return [
        s("as it is"),
        t("as it is, remat full"),
        s("no triton gemm", options=NO_TRITON),
        s("rope", variants=("rope",), options=NO_TRITON),
        t(
            "outputs kept, rope",
            variants=("rope", "outputs", "split"),
            policy="outputs",
            options=NO_TRITON,
            change={"remat": "outputs"},
        ),
        s("rope, split", variants=("rope", "split"), options=NO_TRITON),
        s("rope, split, unstacked", section="unstacked", variants=("rope", "split", "unstacked"), options=NO_TRITON),
        s(
            "fp8 per tensor",
            section="fp8-tensor",
            variants=("rope", "fp8-tensor"),
            change={"quantization": "fp8"},
            options=NO_TRITON,
        ),
        s("low-rank basis, rope", kind="low-rank", variants=("rope",), options=NO_TRITON),
        t(
            "outputs, qkv kept, rope, split",
            variants=("rope", "outputs", "split", "qkv"),
            policy="outputs+qkv",
            options=NO_TRITON | {"xla_gpu_memory_limit_slop_factor": 118},
            change={"remat": "outputs+qkv"},
        ),
        t(
            "no basis: outputs kept, rope",
            kind="inputs",
            variants=("rope", "outputs", "split"),
            policy="outputs",
            options=NO_TRITON,
            change={"remat": "outputs"},
        ),
        s("int8 as it is", section="int8", change={"quantization": "int8"}),
        s("fp8 as it is", section="fp8", change={"quantization": "fp8"}),
        t("attention kept", policy="attention+", change={"remat": "attention+"}),
        t("no triton gemm, remat full", options=NO_TRITON),
        s("rope, triton gemm", variants=("rope",)),
    ]


WEIGHTS = {}


def make_weights(setting):
    start = time.monotonic()
    _, state = nnx.split(random_flux(setting))
    jax.block_until_ready(state)
    WEIGHTS["none"] = state
    say(f"weights made, {time.monotonic() - start:.1f} s")


def with_structure(setting, state):
    """These weights as the state of `setting`'s graph."""
    _, abstract = graph(setting)
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(state))


def measure_ceilings(args, results, sample, train, deadline):
    kinds = ["fp8"] if jax.default_backend() == "gpu" else []
    d, m = sample.model.features, sample.length
    source = jnp.ones(2**29 if not args.tiny else 2**20, jnp.float32)
    results.put(
        "ceilings",
        "copy GB/s",
        round(2 * source.nbytes / ceilings.best_seconds(jax.jit(lambda x: x + 1), source) / 1e9),
    )
    del source
    from lorweb_jax.nn.attention import attend

    for name, setting, backward in (("sample", sample, False), ("train", train, False), ("train", train, True)):
        q, k, v = (
            normal(
                seed,
                (setting.batch, setting.length, setting.model.num_attention_heads, setting.model.attention_head_dim),
                setting.dtype,
            )
            for seed in range(3)
        )

        def forward(q, k, v, setting=setting):
            return attend(q, k, v, setting.attention)

        def both(q, k, v, forward=forward):
            return jax.vjp(forward, q, k, v)[1](v)

        f = jax.jit(both if backward else forward)
        found = ceilings.best_seconds(f, q, k, v)
        products = (7 if backward else 2) * 2 * setting.batch * setting.length**2 * setting.model.features
        results.put(
            "attention",
            f"{name} {'forward + backward' if backward else 'forward'} {list(q.shape)}",
            {"ms": round(1e3 * found, 3), "TFLOP/s": round(products / found / 1e12, 1)},
        )
    for dtype in [sample.dtype, *kinds]:
        for shape in [(m, d, d), (m, d, 4 * d), (m, 4 * d, d), (m, 5 * d, d), (8192, 8192, 8192)][
            : 2 if args.tiny else None
        ]:
            if time.monotonic() > deadline - 10:
                return
            try:
                rate = ceilings._rate(shape, dtype)
                results.put(
                    "ceilings",
                    f"{dtype} {list(shape)}",
                    f"{rate / 1e12:.1f} T/s, {2e3 * shape[0] * shape[1] * shape[2] / rate:.4f} ms",
                )
            except Exception as error:
                results.put("failed", f"ceiling {dtype} {shape}", str(error)[:200])


def measure_group(group, members, results, deadline, sample, args):
    if not members:
        return
    setting = members[0].setting
    if group in ("int8", "fp8", "fp8-tensor"):
        WEIGHTS.pop("none", None)
        if WEIGHTS.get("kind") != setting.quantization:
            WEIGHTS.pop("held", None)
            _, WEIGHTS["held"] = nnx.split(random_flux(setting))
            WEIGHTS["kind"] = setting.quantization
        state = WEIGHTS["held"]
        if group == "fp8-tensor":
            state = fp8_state(state)
            WEIGHTS.pop("held")
    else:
        if "none" not in WEIGHTS:
            make_weights(sample)
        state = WEIGHTS["none"]
    if group == "unstacked":
        state = unstacked_state(state)
    given = dict(inputs_cached(setting))
    if setting.what == "sample":
        query, _ = given.pop("query"), given.pop("target")
        levels = {name: given.pop(name) for name in ("pooled_bp", "timestep_b", "guidance_b")}
        mods = jax.tree.map(lambda s: normal(1, s.shape, str(s.dtype), 0.1), mods_of(setting, shapes(levels)))
    for program in members:
        if time.monotonic() > deadline - 6:
            results.put("skipped", program.name, "no time to measure it")
            continue
        try:
            if program.setting.what == "sample":
                mixes = None
                if program.kind == "low-rank":
                    basis = random_basis(setting, setting.dtype)
                    mixes = basis.adapters(nnx.jit(lambda b, q: b.coefficients(q))(basis, query))
                run = runner(program, (state, given, mods, mixes))
            elif program.kind == "basis":
                trainable = {
                    path: normal(seed, s.shape, "float32", 0.02)
                    for seed, (path, s) in enumerate(trainables(program.setting)[0].items())
                }
                optimizer = ours.paper_optimizer(program.setting.moments)
                opt_state = jax.jit(optimizer.init)(trainable)
                run = train_runner(program, trainable, opt_state, with_structure(program.setting, state), given)
                del trainable, opt_state
            else:
                run = runner(program, (with_structure(program.setting, state), given))
            found = seconds_of(run, 15.0 if setting.what == "sample" else 20.0)
            median = found["ms"][1]
            found["TFLOP/s"] = round(program.flops / median / 1e9, 1)
            if setting.what == "train":
                found["ms a sample"] = round(median / setting.batch, 2)
            stats = jax.devices()[0].memory_stats() or {}
            found["peak GiB so far"] = round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)
            results.put(group, program.name, found)
            if program.name in ("as it is", "rope, split", "outputs kept, rope") and not args.tiny:
                profile(run, results, f"{group} {program.name}", args.out)
            del run
        except Exception as error:
            traceback.print_exc()
            results.put("failed", f"{group} {program.name}", f"{type(error).__name__}: {str(error)[:300]}")


def runner(program, call):
    def run(count):
        for _ in range(count):
            made = program.compiled(*call)
        jax.block_until_ready(made)

    return run


def train_runner(program, trainable, opt_state, state, given):
    held = [trainable, opt_state]

    def run(count):
        for _ in range(count):
            held[0], held[1], value = program.compiled(held[0], held[1], state, given)
        jax.block_until_ready((value, held[0]))

    return run


def profile(run, results, name, out):
    """The kernels of two calls by total time, from the profiler's trace."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            jax.profiler.start_trace(folder)
            run(2)
            jax.profiler.stop_trace()
            file = next(Path(folder).rglob("*.xplane.pb"))
            total, count = collections.Counter(), collections.Counter()
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if "GPU" not in plane.name or "CUPTI" in plane.name:
                    continue
                for line in plane.lines:
                    if "Stream" not in line.name:
                        continue
                    for event in line.events:
                        total[event.name] += event.duration_ns / 2e6
                        count[event.name] += 1
        table = [[round(ms, 3), count[kernel] // 2, kernel[:120]] for kernel, ms in total.most_common(45)]
        (out / f"profile_{name.replace(' ', '_').replace(',', '')}.json").write_text(json.dumps(table, indent=0))
        results.put("profile", name, {"kernels ms": round(sum(total.values()), 2), "top": table[:3]})
    except Exception as error:
        results.put("failed", f"profile {name}", f"{type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
