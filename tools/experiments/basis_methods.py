"""What the experiments with a basis compare: each method's changes to the config, and the lists they are run in."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Method(NamedTuple):
    """A training. changes: to the config of the basis, by dotted field; sizes may be functions of that config.

    rate_of: the method whose learning rate it takes; "" for one that has a sweep of its own.
    """

    title: str
    changes: dict[str, Any]
    rate_of: str = "basis"

    def apply(self, config: ConfigDict) -> None:
        values = {name: value(config) if callable(value) else value for name, value in self.changes.items()}
        config.update_from_flattened_dict(values)


# The router as published: as fast as the members, their sum not scaled. The default run has another.
_PUBLISHED = {"routing.rate": 1.0, "basis.scale": 1.0}
_LORA = {"basis.size": 1, "basis.query": "fixed", **_PUBLISHED}


def _whole_rank(config: ConfigDict) -> int:
    return config.basis.size * config.basis.rank


def _equal_rank(config: ConfigDict) -> int:
    """The rank at which one LoRA has as many trained numbers as the basis with its router, as nearly as may be."""
    from flax import nnx

    from lorweb_jax.adapters.basis import BasisConfig, BasisParam
    from lorweb_jax.pipeline.folder import PipelineFolder

    folder = PipelineFolder(config.pipeline, config.basis.encoder or None)
    model = nnx.eval_shape(lambda: folder.make(nnx.Rngs(0), BasisConfig(**config.basis)))
    parameters = sum(array.size for array in nnx.to_flat_state(nnx.state(model, BasisParam)).leaves)
    of_one_rank = sum(each.depth * (each.inputs + each.outputs) for each in folder.backbone.adapted.values())
    return round(parameters / of_one_rank)


def _sizes(size: int, rank: int) -> dict[str, float]:
    return {"basis.size": size, "basis.rank": rank, "basis.scale": float(size)}


def _members(config: ConfigDict) -> float:
    return float(config.basis.size)


def _published(title: str, changes: dict[str, Any]) -> Method:
    """The published basis with something that may spread the work over its members."""
    return Method(f"published, {title}", _PUBLISHED | changes, "published")


METHODS = {
    "basis": Method("basis", {}, ""),
    "published": Method("basis, published router", _PUBLISHED, ""),
    "lora_nr": Method("one LoRA of rank N·r", {"basis.rank": _whole_rank, **_LORA}, ""),
    "lora_r": Method("one LoRA of rank r", _LORA, ""),
    "lora_equal": Method("one LoRA of as many trained numbers", {"basis.rank": _equal_rank, **_LORA}, "lora_nr"),
    "basis_4x16": Method("basis, N = 4, r = 16", _sizes(4, 16)),
    "basis_8x8": Method("basis, N = 8, r = 8", _sizes(8, 8)),
    "basis_32x2": Method("basis, N = 32, r = 2", _sizes(32, 2)),
    "basis_4x4": Method("basis, N = 4, r = 4", _sizes(4, 4)),
    "basis_8x4": Method("basis, N = 8, r = 4", _sizes(8, 4)),
    "basis_32x4": Method("basis, N = 32, r = 4", _sizes(32, 4)),
    "grid_query": Method("basis, one encoding of the 2×2 grid", {"basis.query_mode": "caa'b"}),
    "difference_query": Method("basis, query E(a′) − E(a)", {"basis.query_mode": "ca'-ca"}),
    "internal": Method("basis, each layer's own input", {"basis.query": "internal", "basis.query_mode": "aa'bb'"}),
    "constant": Method("basis, every coefficient 1/N", {"basis.temperature": 1e6}),
    "tanh": _published("tanh", {"basis.activation": "tanh"}),
    "balance_01": _published("balance 0.01", {"routing.balance": 0.01}),
    "balance_1": _published("balance 0.1", {"routing.balance": 0.1}),
    "warm": _published("temperature 4", {"basis.temperature": 4.0}),
    "learnt": _published("learnt temperature", {"basis.temperature": 4.0, "basis.temperature_mode": "learnt"}),
    "annealed": _published("temperature 16 to 1", {"basis.temperature": 16.0, "basis.temperature_mode": "annealed"}),
    "normalised": _published("normalised query and keys", {"basis.normalised": True}),
    "small_keys": _published("fresh keys of 0.1", {"basis.key_scale": 0.1}),
    "heads": _published("4 heads", {"basis.heads": 4}),
    "dropout": _published("a quarter of the members dropped", {"routing.member_dropout": 0.25}),
    "slow": _published("router's rate 0.03", {"routing.rate": 0.03}),
    "scaled": _published("scale N", {"basis.scale": _members}),
    "tenth": Method("basis, router's rate 0.1", {"routing.rate": 0.1}),
    "still": Method("basis, fresh router kept", {"routing.rate": 0.0}),
    "silent": Method("basis, trained without instruction", {"data.caption_drop": 1.0}),
}


SPLITS = {"held_out_drawings": "seen tasks, new drawings", "held_out_tasks": "unseen tasks"}  # that are shown
REFERENCES = {"base": "frozen base", "copy": "copy b"}  # words of `lorweb_jax.evaluate` that need no training


class Probe(NamedTuple):
    """Another evaluation of what a method trained.

    of: a method, or "base". kind: of words.PROBES, with its number, or "". wording: of the instructions, see
    `Study.samples`.
    """

    title: str
    of: str
    kind: str = ""
    wording: str = "reduced"


PROBES = {
    "wrong": Probe("basis, router shown the pair of another task", "basis", "wrong"),
    "mean": Probe("basis, the router's average for every analogy", "basis", "mean"),
    "adapted": Probe("basis, coefficients adapted to the pair", "basis", "adapted"),
    "adapted_lora": Probe("one LoRA of rank N·r, each layer's strength adapted to the pair", "lora_nr", "adapted"),
    "pairs": Probe("basis, mean over the pairs of the task", "basis", "pairs"),
    "strength_05": Probe("basis at strength 0.5", "basis", "strength:0.5"),
    "strength_15": Probe("basis at strength 1.5", "basis", "strength:1.5"),
    "strength_2": Probe("basis at strength 2", "basis", "strength:2"),
    "base_full": Probe("frozen base, full instruction", "base", wording="full"),
    "lora_full": Probe("one LoRA of rank N·r, full instruction", "lora_nr", wording="full"),
    "basis_full": Probe("basis, full instruction", "basis", wording="full"),
    "base_none": Probe("frozen base, no instruction", "base", wording="none"),
    "lora_none": Probe("one LoRA of rank N·r, no instruction", "lora_nr", wording="none"),
    "basis_none": Probe("basis, no instruction", "basis", wording="none"),
    "silent_none": Probe("basis, trained and asked without instruction", "silent", wording="none"),
}
TITLES = REFERENCES | {name: each.title for name, each in (METHODS | PROBES).items()}


class Group(NamedTuple):
    """A list of methods that are run together. seeds: how many by default. references: shown beside them. probes:
    measured of what they trained. pairs: whose difference is shown beside each one's to the basis."""

    title: str
    methods: tuple[str, ...]
    seeds: int = 3
    references: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()


GROUPS = {
    "main": Group("Basis against one LoRA", ("basis", "published", "lora_nr", "lora_r"), 5, tuple(REFERENCES)),
    "listening": Group(
        "Does it listen to the pair?",
        ("basis", "lora_nr"),
        5,
        (),
        ("wrong", "mean", "adapted", "adapted_lora"),
        (("adapted_lora", "adapted"), ("adapted_lora", "lora_nr"), ("lora_nr", "adapted")),
    ),
    "mixes": Group(
        "Strength, several pairs, adaptation",
        ("basis",),
        5,
        ("base", "copy"),
        ("strength_05", "strength_15", "strength_2", "pairs", "adapted"),
    ),
    "sizes": Group(
        "Members and rank",
        ("basis", "lora_equal", "basis_4x16", "basis_8x8", "basis_32x2", "basis_4x4", "basis_8x4", "basis_32x4"),
    ),
    "router": Group(
        "What the router sees and says",
        ("basis", "grid_query", "difference_query", "constant", "still", "tenth", "internal"),
    ),
    "sharing": Group(
        "Members that share the work",
        (
            "published",
            "tanh",
            "balance_01",
            "balance_1",
            "warm",
            "learnt",
            "annealed",
            "normalised",
            "small_keys",
            "heads",
            "dropout",
            "slow",
            "scaled",
            "basis",
        ),
    ),
    "instruction": Group(
        "Full, reduced and no instruction",
        ("basis", "lora_nr", "silent"),
        3,
        ("base",),
        tuple(name for name, probe in PROBES.items() if probe.wording != "reduced"),
    ),
}
