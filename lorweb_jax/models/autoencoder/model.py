"""The image autoencoder of FLUX: diffusers' `AutoencoderKL` on NHWC, with diffusers' parameter names.

An image [b, H, W, 3] in −1..1 becomes a Gaussian over latents [b, H/f, W/f, c]; f = 8 and c = 16 in FLUX.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, Pixels, Width, as_dataclass, checked, require_class
from lorweb_jax.nn.layers import Conv, Linear, Weight


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder, named as in diffusers' vae/config.json; the defaults are FLUX.1's."""

    in_channels: Annotated[int, Between(3, 3)] = 3
    out_channels: Annotated[int, Between(3, 3)] = 3
    latent_channels: Width = 16
    block_out_channels: Annotated[tuple[Width, ...], Between(1, 8)] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Between(1, 16)] = 2
    norm_num_groups: Width = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    scaling_factor: Annotated[float, Between(1e-4, 1e4)] = 0.3611
    shift_factor: Annotated[float, Between(-1e4, 1e4)] = 0.1159
    sample_size: Pixels = 1024

    def __post_init__(self):
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"the VAE's config has block_out_channels {list(self.block_out_channels)} and "
                    f"norm_num_groups {self.norm_num_groups}; each width must be a multiple of it"
                )

    @property
    def downscale(self) -> int:
        """Pixels of an image side for one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: dict[str, Any], source: str | Path = "vae/config.json") -> "VAEConfig":
        """From the contents of diffusers' vae/config.json, called `source` in messages; what is left out (or null) is
        as diffusers has it. UserError for a wrong type or size, or an autoencoder of another kind."""
        require_class(config, "AutoencoderKL", source)
        stated = {name: value for name, value in config.items() if value is not None}
        return as_dataclass(checked(stated, _VAEFile, source), cls)

    def to_json(self) -> dict[str, Any]:
        """The contents of diffusers' vae/config.json."""
        blocks = len(self.block_out_channels)
        return (
            {
                "_class_name": "AutoencoderKL",
                "act_fn": "silu",
                "latents_mean": None,
                "latents_std": None,
                "down_block_types": ["DownEncoderBlock2D"] * blocks,
                "up_block_types": ["UpDecoderBlock2D"] * blocks,
                "force_upcast": True,
            }
            | asdict(self)
            | {"block_out_channels": list(self.block_out_channels)}
        )


@dataclass(frozen=True)
class _VAEFile(VAEConfig):
    """config.json with diffusers' own defaults, which are Stable Diffusion's, and what it may say only in one way."""

    latent_channels: Width = 4
    block_out_channels: Annotated[tuple[Width, ...], Between(1, 8)] = (64,)
    layers_per_block: Annotated[int, Between(1, 16)] = 1
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: Annotated[float, Between(1e-4, 1e4)] = 0.18215
    shift_factor: Annotated[float, Between(-1e4, 1e4)] = 0.0
    sample_size: Pixels = 32
    act_fn: Literal["silu"] = "silu"
    latents_mean: None = None
    latents_std: None = None
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ()
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ()


class GroupNorm(nnx.Module):
    """(x − mean) / √(var + 1e-6) · scale + bias; float32 statistics over a group of channels and all positions."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs):
        self.groups = groups
        self.scale = Weight(jnp.ones((features,), jnp.float32))
        self.bias = Weight(jnp.zeros((features,), jnp.float32))

    def _mean(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, 1, 1, c]; positions first, which XLA's CPU compiler makes three times as fast."""
        b, _, _, c = x.shape
        mean = x.mean((1, 2)).reshape(b, self.groups, c // self.groups).mean(-1)
        return mean.repeat(c // self.groups, axis=-1)[:, None, None]

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - self._mean(wide)
        factor = jax.lax.rsqrt(self._mean(jnp.square(centred)) + 1e-6) * self.scale[...]
        return (centred * factor + self.bias[...]).astype(x.dtype)


class Resnet(nnx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, in_features: int, out_features: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_features, groups, rngs=rngs)
        self.conv1 = Conv(in_features, out_features, rngs=rngs)
        self.norm2 = GroupNorm(out_features, groups, rngs=rngs)
        self.conv2 = Conv(out_features, out_features, rngs=rngs)
        self.conv_shortcut = Conv(in_features, out_features, 1, rngs=rngs) if in_features != out_features else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """x + one head of attention over all positions of the map."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(features, groups, rngs=rngs)
        self.to_q = Linear(features, features, role="any", rngs=rngs)
        self.to_k = Linear(features, features, role="any", rngs=rngs)
        self.to_v = Linear(features, features, role="any", rngs=rngs)
        self.to_out_0 = Linear(features, features, role="any", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, 1, c)
        y = jax.nn.dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out_0(y).reshape(b, h, w, c)


class Downsample(nnx.Module):
    """A convolution of stride 2 that pads below and on the right only."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = Conv(features, features, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = Conv(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class DownBlock(nnx.Module):
    """Resnets at one resolution, then (except in the last block) a downsampler."""

    def __init__(self, widths: list[int], groups: int, *, downsample: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([Resnet(i, o, groups, rngs=rngs) for i, o in zip(widths, widths[1:])])
        self.downsamplers = nnx.List([Downsample(widths[-1], rngs=rngs)] if downsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """Resnets at one resolution, then (except in the last block) an upsampler."""

    def __init__(self, widths: list[int], groups: int, *, upsample: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([Resnet(i, o, groups, rngs=rngs) for i, o in zip(widths, widths[1:])])
        self.upsamplers = nnx.List([Upsample(widths[-1], rngs=rngs)] if upsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, features: int, groups: int, *, attention: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([Resnet(features, features, groups, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(features, groups, rngs=rngs)] if attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Image [b, H, W, 3] -> [b, H/f, W/f, 2c], the mean and log variance side by side."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock([i] + [o] * config.layers_per_block, groups, downsample=o_index < len(widths) - 1, rngs=rngs)
                for o_index, (i, o) in enumerate(zip((widths[0], *widths), widths))
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, attention=config.mid_block_add_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents [b, H/f, W/f, c] -> image [b, H, W, 3]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, attention=config.mid_block_add_attention, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpBlock(
                    [i] + [o] * (config.layers_per_block + 1), groups, upsample=o_index < len(widths) - 1, rngs=rngs
                )
                for o_index, (i, o) in enumerate(zip((widths[0], *widths), widths))
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder; computes in the dtype of its input."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        c = config.latent_channels
        self.quant_conv = Conv(2 * c, 2 * c, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv(c, c, 1, rngs=rngs) if config.use_post_quant_conv else None

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image [b, H, W, 3] in −1..1 -> (mean, log variance), each [b, H/f, W/f, c], before shift and scale.

        Raises UserError if a side is not a multiple of f.
        """
        f = self.config.downscale
        if image.shape[1] % f or image.shape[2] % f:
            raise UserError(
                f"the image is {image.shape[2]}x{image.shape[1]}; the autoencoder needs sides that are "
                f"multiples of {f}: resize it"
            )
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [b, h, w, c] before shift and scale -> image [b, f·h, f·w, 3], about −1..1 (not clipped)."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def latents(self, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Image [b, H, W, 3] in −1..1 -> the flow's latents (z − shift)·scale [b, H/f, W/f, c].

        z is a sample drawn with `key`, or the mode where no key is given (method.md §1).
        """
        z, logvar = self.encode(image)
        if key is not None:
            z = z + jnp.exp(0.5 * logvar) * jax.random.normal(key, z.shape, z.dtype)
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def posterior(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image [b, H, W, 3] in −1..1 -> (mean, standard deviation) of the flow's latents, each [b, H/f, W/f, c]."""
        mean, logvar = self.encode(image)
        scale = self.config.scaling_factor
        return (mean - self.config.shift_factor) * scale, jnp.exp(0.5 * logvar) * scale

    def image(self, latents: jax.Array) -> jax.Array:
        """The flow's latents [b, h, w, c] -> image [b, f·h, f·w, 3], about −1..1; inverse of `latents`."""
        return self.decode(latents / self.config.scaling_factor + self.config.shift_factor)
