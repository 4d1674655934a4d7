"""diffusers' FluxTransformer2DModel at full size on the same device: sampling, eager and compiled, and LoRA training.

The same shapes as speed.py's: 8,192 + 512 tokens for a sampling step, 6 x (2,048 + 512) for a training step of a LoRA
of rank 128 on every linear layer of the blocks, with gradient checkpointing, AdamW in torch's fused form.
"""

import json
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import FluxTransformer2DModel

from lorweb_jax.common.command_line import Parser, nonempty_path

START = time.monotonic()
TINY = dict(num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=64)


def inputs(model, batch, tokens, text, device):
    config, half = model.config, tokens // 2
    width = int(half**0.5)
    index = torch.arange(half)
    ids = torch.cat([torch.stack([torch.full_like(index, t), index // width, index % width], -1) for t in (0, 1)])
    random = dict(device=device, dtype=torch.bfloat16)
    return dict(
        hidden_states=torch.randn(batch, tokens, config.in_channels, **random),
        encoder_hidden_states=torch.randn(batch, text, config.joint_attention_dim, **random),
        pooled_projections=torch.randn(batch, 768, **random),
        timestep=torch.linspace(0.3, 0.7, batch, device=device),
        guidance=torch.full((batch,), 2.5, device=device),
        img_ids=ids.float().to(device),
        txt_ids=torch.zeros(text, 3, device=device),
    )


def seconds_of(step, sync, budget):
    for _ in range(2):
        step()
    sync()
    start = time.monotonic()
    step()
    sync()
    count = max(1, min(20, int(budget / 3 / (time.monotonic() - start))))
    found = []
    for _ in range(3):
        start = time.monotonic()
        for _ in range(count):
            step()
        sync()
        found.append(round(1000 * (time.monotonic() - start) / count, 3))
    return {"ms": sorted(found), "calls": 3 * count}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=nonempty_path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    results = {}

    def put(name, value):
        results[name] = value
        (args.out / "torch.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"[{time.monotonic() - START:6.1f}] torch {name}: {value}", flush=True)

    import diffusers

    put("versions", f"torch {torch.__version__}, diffusers {diffusers.__version__}, {device}")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        # Uninitialised memory could hold not-a-numbers; normal weights are drawn in place.
        model = FluxTransformer2DModel(guidance_embeds=True, **(TINY if args.tiny else {}))
    torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    put("built after s", round(time.monotonic() - START, 1))
    given = inputs(model, 1, *((32, 16) if args.tiny else (8192, 512)), device)

    def forward():
        with torch.no_grad():
            return model(**given, return_dict=False)[0]

    put("sampling, eager", seconds_of(forward, sync, 3))
    try:
        start = time.monotonic()
        model.compile_repeated_blocks(fullgraph=True)
        forward()
        sync()
        put("compiled in s", round(time.monotonic() - start, 1))
        put("sampling, blocks compiled", seconds_of(forward, sync, 3))
    except Exception as error:
        traceback.print_exc()
        put("sampling, blocks compiled", f"failed: {type(error).__name__}: {str(error)[:200]}")

    from peft import LoraConfig

    names = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "net.0.proj",
        "net.2",
        "proj_mlp",
        "proj_out",
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
    ]
    layers = "|".join(name.replace(".", r"\.") for name in names)
    model.add_adapter(LoraConfig(r=128, lora_alpha=128, target_modules=rf".*transformer_blocks\..*({layers})"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    model.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=device == "cuda")
    batch = 2 if args.tiny else 6
    given = inputs(model, batch, *((32, 16) if args.tiny else (2048, 512)), device)
    target = torch.randn(batch, given["hidden_states"].shape[1] // 2, 64, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16):
            velocity = model(**given, return_dict=False)[0][:, : target.shape[1]]
        (velocity.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found = seconds_of(step, sync, 8)
    found["ms a sample"] = round(found["ms"][1] / batch, 2)
    found["trained"] = sum(p.numel() for p in trained)
    if device == "cuda":
        found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    put(f"training, LoRA of rank 128, batch {batch}, gradient checkpointing, blocks compiled", found)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
