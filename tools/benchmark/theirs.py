"""The rows measured in torch: diffusers' FluxTransformer2DModel, eager and through torch.compile."""

import dataclasses
import math
import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from benchmark.ours import Step
from benchmark.setting import Setting


def make_step(kind: str, setting: Setting, device: str) -> Step:
    """A forward, or a forward and backward to all weights. Random weights are made on the device, in the dtype."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, setting.dtype))
    with torch.device(device):
        model = FluxTransformer2DModel(**dataclasses.asdict(setting.model))
        given, target = inputs(setting)
    torch.set_default_dtype(torch.float32)
    training = setting.what == "train"
    model.train(training).requires_grad_(training)
    if training and setting.remat == "full":
        model.enable_gradient_checkpointing()
    called = torch.compile(model) if kind == "compiled" else model

    def step():
        velocity = called(**given, return_dict=False)[0]
        if training:
            error = velocity[:, : target.shape[1]].float() - target.float()
            error.square().mean().backward()
            model.zero_grad(set_to_none=True)

    def run(count):
        with torch.inference_mode(not training):
            for _ in range(count):
                step()
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    run(1)
    partly = training and setting.remat not in ("none", "full")
    return Step(
        run,
        time.perf_counter() - start if kind == "compiled" else 0.0,
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        note=f"keeps every intermediate: torch has no policy like {setting.remat}" if partly else "",
    )


def inputs(setting: Setting) -> tuple[dict[str, Any], torch.Tensor]:
    """Random arguments of the model and a target for its velocity, of the shapes that ours gets."""
    config, b, s, t = setting.model, setting.batch, setting.tokens, setting.text_tokens
    index = torch.arange(s // 2)
    width = max(1, math.isqrt(s // 2))
    ids = [torch.stack([torch.full_like(index, image), index // width, index % width], -1) for image in (0, 1)]
    given = {
        "hidden_states": torch.randn(b, s, config.in_channels),
        "encoder_hidden_states": torch.randn(b, t, config.joint_attention_dim),
        "pooled_projections": torch.randn(b, config.pooled_projection_dim),
        "timestep": torch.linspace(0.3, 0.7, b),
        "guidance": torch.full((b,), 2.5),
        "img_ids": torch.cat(ids).float(),
        "txt_ids": torch.zeros(t, 3, dtype=torch.float32),
    }
    return given, torch.randn(b, s // 2, config.in_channels)
