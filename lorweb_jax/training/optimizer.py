"""The optimizer that a config describes, AdamW (or Muon) with a clipped gradient, and the average of the weights."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lorweb_jax.training.moments import scale_by_adam

Arrays = dict[str, jax.Array]  # by dotted path


def make_schedule(config) -> optax.Schedule:
    """step -> learning rate: linear rise over `warmup` steps, then constant or a cosine down to 0 at train.steps."""
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if optimizer.warmup else optimizer.learning_rate, optimizer.learning_rate, optimizer.warmup, steps
        )
    if optimizer.warmup:
        return optax.linear_schedule(0.0, optimizer.learning_rate, optimizer.warmup)
    return optax.constant_schedule(optimizer.learning_rate)


def make_optimizer(config, schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
    """Clipping of the gradient by its global norm, then AdamW or Muon.

    `schedule` replaces the config's own, for runs that end at a given time.
    """
    optimizer, schedule = config.optimizer, schedule or make_schedule(config)
    update = _muon(optimizer, schedule) if optimizer.name == "muon" else _adamw(optimizer, schedule, config.seed)
    return optax.chain(optax.clip_by_global_norm(optimizer.clip), update)


def _adamw(optimizer, schedule: optax.Schedule, seed: int) -> optax.GradientTransformation:
    if optimizer.moments == "float32":
        return optax.adamw(schedule, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay)
    return optax.chain(
        scale_by_adam(optimizer.b1, optimizer.b2, optimizer.moments, seed),
        optax.add_decayed_weights(optimizer.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for kernels, as matrices [inputs, outputs]; Adam at 0.3 of the rate for all else."""

    def dimensions(params):
        axes = {2: ((0,), (1,)), 3: ((1,), (2,)), 4: ((0, 1, 2), (3,))}  # dense, stacked dense, convolution
        return {
            name: optax.contrib.MuonDimensionNumbers(*axes[array.ndim]) if name.endswith("kernel") else None
            for name, array in params.items()
        }

    return optax.contrib.muon(
        schedule,
        beta=0.95,
        ns_steps=5,
        adam_b2=optimizer.b2,
        consistent_rms=0.2,
        weight_decay=optimizer.weight_decay,
        muon_weight_dimension_numbers=dimensions,
        adam_learning_rate=lambda step: 0.3 * schedule(step),
    )


def moving_average(average: Arrays, weights: Arrays, step: jax.Array, decay: float) -> Arrays:
    """d·average + (1 − d)·weights after the update with index `step`, d = min(decay, (1 + step) / (10 + step)): the
    initial weights are soon forgotten."""
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, w: d * a + (1 - d) * w, average, weights)
