"""The rows measured in torch: diffusers' FluxTransformer2DModel, eager and through torch.compile; in training also with
peft's LoRA."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from benchmark.ours import Step
from benchmark.setting import Setting


def make_step(kind: str, setting: Setting, device: str) -> Step:
    """A forward; a forward and backward to all weights; or a training step of a LoRA as large as the basis. Random
    weights are made on the device, in the dtype."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, setting.dtype))
    with torch.device(device):
        model = FluxTransformer2DModel(**dataclasses.asdict(setting.model))
        given, target = inputs(setting)
    torch.set_default_dtype(torch.float32)
    training, lora, compiled = setting.what == "train", kind.startswith("lora"), kind.endswith("compiled")
    model.train(training).requires_grad_(training and not lora)
    update = _lora(model, setting.basis_size * setting.basis_rank) if lora else model.zero_grad
    if training and setting.remat == "full":
        model.enable_gradient_checkpointing()
    called = torch.compile(model) if compiled else model

    def step():
        # As diffusers' scripts train a float32 LoRA over a narrower base.
        with torch.autocast(device, torch.bfloat16, enabled=lora and setting.dtype == "bfloat16"):
            velocity = called(**given, return_dict=False)[0]
        if training:
            error = velocity[:, : target.shape[1]].float() - target.float()
            error.square().mean().backward()
            update()

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
        time.perf_counter() - start if compiled else 0.0,
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        note=f"keeps every intermediate: torch has no policy like {setting.remat}" if partly else "",
    )


def _lora(model: FluxTransformer2DModel, rank: int) -> Callable[[], None]:
    """Gives every linear layer of the blocks a float32 LoRA of this rank; what clips its gradient and updates it, by
    AdamW, as ours does a basis."""
    from peft import LoraConfig

    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name
    ]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.05, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


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
