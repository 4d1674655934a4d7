"""The full-size model's steps as programs, traced from shapes alone: nothing is on the device before measuring."""

import concurrent.futures
import dataclasses
import time

import jax
import jax.numpy as jnp
from flax import nnx
from variants import applied

from benchmark import ours
from benchmark.random_weights import inputs, new_flux
from benchmark.setting import DEFAULTS, Setting
from lorweb_jax.adapters.mixture import LowRankAdapter
from lorweb_jax.nn.quantization import as_multiplied
from lorweb_jax.planning.flops import base_flops, basis_flops
from lorweb_jax.processes.compiler_flags import FOR_GPUS, FOR_TRAINING


def setting_of(what, tiny):
    size = "tiny" if tiny else "kontext"
    tokens, text, batch, remat, unroll = DEFAULTS[size, what]
    return Setting(
        size=size,
        what=what,
        dtype="float32" if tiny else "bfloat16",
        tokens=tokens,
        text_tokens=text,
        batch=batch,
        repeats=1,
        basis_size=32,
        basis_rank=4,
        quantization="none",
        moments="float32",
        remat=remat,
        unroll=1 if tiny else unroll,
        attention="xla" if tiny else "cudnn",
        threads=1,
    )


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def graph(setting):
    """(graphdef, state's shapes) of the transformer, weights in the setting's dtype."""

    def make():
        flux = new_flux(setting)
        if setting.unstacked:
            flux.unstack()
        return flux

    graphdef, state = nnx.split(nnx.eval_shape(make))

    def cast(leaf):
        wide = leaf.dtype == jnp.float32 and leaf.shape[-2:-1] != (1,)
        return as_multiplied(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(setting.dtype) if wide else leaf.dtype))

    return graphdef, jax.tree.map(cast, state)


_INPUTS = {}


def inputs_of(setting):
    key = setting.size, setting.what, setting.batch, setting.tokens
    if key not in _INPUTS:
        _INPUTS[key] = inputs(setting)
    return dict(_INPUTS[key])


class Program:
    """A step: how it is traced, with which variants and compiler options, and what it is called with.

    kind: "base" or "low-rank" of sampling; "basis" or "inputs" of training."""

    def __init__(self, section, name, setting, *, kind, flops, variants=(), options=None):
        self.section, self.name, self.setting, self.kind = section, name, setting, kind
        self.variants, self.options, self.flops = variants, options, flops
        self.compiled = None

    def lower(self):
        setting, donate = self.setting, ()
        with applied(self.variants):
            graphdef, state = graph(setting)
            arguments = shapes(inputs_of(setting))
            if setting.what == "sample":
                levels = {name: arguments.pop(name) for name in ("pooled_bp", "timestep_b", "guidance_b")}
                del arguments["query"], arguments["target"]
                adapters = adapter_shapes(setting) if self.kind == "low-rank" else None
                function = ours.step_without_modulations(graphdef)
                called_with = (state, arguments, modulation_shapes(setting, levels), adapters)
            elif self.kind == "basis":
                trainable, opt_state, optimizer = trainable_shapes(setting)
                function = ours.train_step(graphdef, setting.basis, optimizer)
                called_with, donate = (trainable, opt_state, state, arguments), (0, 1)
            else:
                function, called_with = ours.gradients(self.kind, graphdef), (state, arguments)
            return jax.jit(function, donate_argnums=donate).lower(*called_with)

    def compile(self, lowered):
        start = time.monotonic()
        options = self.options if jax.default_backend() == "gpu" else None
        self.compiled = lowered.compile(compiler_options=options)
        analysis = self.compiled.memory_analysis()
        sizes = ("argument", "output", "temp", "alias")
        gib = analysis and {name: getattr(analysis, f"{name}_size_in_bytes") / 2**30 for name in sizes}
        return {"seconds": round(time.monotonic() - start, 1), "GiB": gib}


def compile_all(programs, results, until, threads):
    """Those of the programs that were compiled by the time `until`, side by side in so many threads."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(threads), {}
    for program in programs:
        if time.monotonic() > until:
            results.put("skipped", f"{program.section} {program.name}", "no time to compile it")
            continue
        try:
            waiting[pool.submit(program.compile, program.lower())] = program
        except Exception as error:
            results.failed(f"lowering {program.section} {program.name}", error)
    concurrent.futures.wait(waiting, timeout=max(1, until - time.monotonic()))
    pool.shutdown(wait=False, cancel_futures=True)
    ready = []
    for future, program in waiting.items():
        name = f"{program.section} {program.name}"
        if not future.done() or future.cancelled():
            results.put("skipped", name, "still compiling when measuring began")
        elif future.exception():
            results.failed(f"compiling {name}", future.exception())
        else:
            results.put("compile", name, future.result())
            ready.append(program)
    return ready


def modulation_shapes(setting, levels):
    graphdef, state = graph(dataclasses.replace(setting, quantization="none", remat="none", unstacked=False))
    return jax.eval_shape(
        lambda state, at: nnx.merge(graphdef, state).modulations(at["pooled_bp"], at["timestep_b"], at["guidance_b"]),
        state,
        levels,
    )


def adapter_shapes(setting):
    c, shape = setting.basis, jax.ShapeDtypeStruct
    return {
        path: LowRankAdapter(
            shape((layer.depth, c.size, layer.inputs, c.rank), setting.dtype),
            shape((layer.depth, c.size, c.rank, layer.outputs), setting.dtype),
            shape((layer.depth, setting.batch, c.size), jnp.float32),
            c.scale,
        )
        for path, layer in setting.backbone.adapted.items()
    }


def trainable_shapes(setting):
    """(trainables, optimizer's state, optimizer) of a basis."""
    c, trainable = setting.basis, {}
    for path, layer in setting.backbone.adapted.items():
        l, i, o = layer.depth, layer.inputs, layer.outputs
        sizes = {
            "a": (l, c.size, i, c.rank),
            "b": (l, c.size, c.rank, o),
            "keys": (l, c.size, c.key_dim),
            "projection": (l, c.key_dim, c.query_dim),
        }
        trainable |= {f"{path}.{name}": jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    optimizer = ours.paper_optimizer(setting.moments)
    return trainable, jax.eval_shape(optimizer.init, trainable), optimizer


GROUPS = ("unstacked", "fp8", "stacked", "trials", "ceilings", "int8")


def all_programs(sample, train):
    """Every program of the session, those of a group in the order of what they tell."""
    step = base_flops("velocity", sample.backbone, sample.batch, sample.tokens, sample.text_tokens)
    sizes = (train.batch, train.tokens, train.text_tokens)
    update = base_flops("basis", train.backbone, *sizes) + basis_flops("basis", train.backbone, train.basis, *sizes)

    def s(name, section="stacked", kind="base", variants=(), options=FOR_GPUS, **change):
        setting = dataclasses.replace(sample, **change)
        return Program(section, name, setting, kind=kind, flops=step, variants=variants, options=options)

    def t(name, remat, section="stacked", kind="basis", variants=(), options=FOR_TRAINING, **change):
        setting = dataclasses.replace(train, remat=remat, **change)
        flops = update * setting.batch / train.batch
        return Program(section, name, setting, kind=kind, flops=flops, variants=variants, options=options)

    free = {"section": "unstacked", "unstacked": True}
    fp8 = {"section": "fp8", "unstacked": True, "quantization": "fp8"}
    return [
        t("train dots, unstacked", "dots", **free),
        t("train fp8, dots, unstacked", "dots", **fp8),
        t("train dots, unstacked, batch 3", "dots", batch=3, **free),
        t("train outputs", "outputs"),
        t("train dots", "dots"),
        s("sample unstacked", **free),
        s("sample fp8, unstacked", **fp8),
        t("train dots, unstacked, no basis", "dots", kind="inputs", **free),
        s("sample"),
        s("sample, before", variants=("before",)),
        t("train dots, norm and rope in one pass", "dots", section="trials", variants=("one pass",)),
        t("train dots, gelu in product", "dots", section="trials", variants=("gelu in product",)),
        s("sample unstacked, norm and rope in one pass", section="trials", unstacked=True, variants=("one pass",)),
        t("train qkv", "qkv"),
        t("train full, before", "full", variants=("before",)),
        s("sample, low-rank basis", kind="low-rank"),
        s("sample int8", section="int8", quantization="int8"),
    ]
