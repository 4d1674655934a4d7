"""How fast the transformer and the basis are on this machine, beside diffusers' in torch.

  tools/benchmark.py                                       the small base, one sampling step
  tools/benchmark.py --quant=none,int8,fp8                 the same, the frozen weights also in 8 bit
  tools/benchmark.py --size=mid --what=train --threads=2 --remat=none,full,attention,outputs,dots
                                                           training a 0.16 B model, and what each remat policy costs
  tools/benchmark.py --size=kontext                        FLUX.1 Kontext's real sizes, bfloat16: a GPU of 80 GB
  tools/benchmark.py --size=kontext --what=train --moments=float32,int8

Weights are random, made on the device. First the ceilings are measured: the fastest matrix product, in 8 bit too where
the hardware makes such products, and the fastest copy; and for --attention=auto each implementation at this shape.
Then each row runs in a process of its own on the same cores, the rows taking turns so that drift hits all of them
alike; rows that don't fit in memory together run one after the other. Rows of "sample", one step each:

  ours                                the plain transformer, modulations of all steps made beforehand, as when sampling
  ours, modulations in the step       the same work a step as diffusers
  ours + basis, low-rank              with the basis beside every linear layer, coefficients computed beforehand
  ours + basis, folded                with one analogy's mix folded into the weights (never in 8 bit)
  diffusers, also with torch.compile  FluxTransformer2DModel; skipped, with the reason, where it can't run

Rows of "train":

  ours, gradient of all weights       forward and backward, what the torch rows do too (never in 8 bit)
  ours frozen, gradient of tokens     forward, and backward through frozen weights: training with nothing to train
  ours frozen, basis train step       router, forward, backward, clipping, AdamW on a float32 basis; latents, text and
                                      queries come ready
  diffusers, also with torch.compile  gradient of all weights; and, beside the basis, a train step of peft's LoRA of
                                      rank N·r on the same layers: forward, backward, clipping, AdamW

--quant, --remat and --moments take lists: of their combinations the first gets every row, the others "ours" and
"low-rank" or the "basis train step". Torch's rows are never quantised.

Columns: the median over the repeats with the shortest and the longest; on a CPU also what all threads together spent,
which other programs on the machine change less; model FLOPs (matrix products counted from shapes, what remat computes
again left out) per second, and their share of the measured matmul ceiling (fp8's for fp8 rows where the hardware
multiplies fp8; int8 weights are multiplied in the row's dtype); the largest memory, of the accelerator or, on a CPU,
of the row's whole process, building and compiling included; bytes of the frozen weights; bytes that the compiler sets
aside for a step; compile time. Under the table stand the ratios of interest.
Needs jax, flax, optax, numpy and safetensors; torch and diffusers where they are to be compared with.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorweb_jax.common.command_line import Parser, nonempty_path, positive  # noqa: E402  (the path above comes first)
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402
from lorweb_jax.common.outputs import require_writable, write_text  # noqa: E402


def one_or_more(*choices: str):
    """A parser of comma-separated lists of these choices."""

    def listed(text: str) -> list[str]:
        names = text.split(",")
        if len(set(names)) < len(names) or not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of different ones of {', '.join(choices)}")
        return names

    return listed


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--size",
        choices=["tiny", "mid", "kontext"],
        default="tiny",
        help="tiny: the small base, 2 + 6 blocks of width 128; mid: 4 + 8 of 768; "
        "kontext: 19 + 38 of 3072 (default: tiny)",
    )
    parser.add_argument("--what", choices=["sample", "train"], default="sample", help="default: sample")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of weights and computation (default: bfloat16 for kontext, else float32)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="noisy and conditioning tokens together, half of each (default: 32, 512; "
        "8192 for kontext, 2048 in training)",
    )
    parser.add_argument("--text-tokens", type=positive, metavar="N", help="default: 16, 128, 512")
    parser.add_argument("--batch", type=positive, metavar="N", help="default: 1; in training 8 for tiny, 6 for kontext")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="of every row (default: 10)")
    parser.add_argument(
        "--basis-size", type=positive, default=32, metavar="N", help="members of the basis (default: 32)"
    )
    parser.add_argument("--basis-rank", type=positive, default=4, metavar="R", help="of each (default: 4)")
    parser.add_argument(
        "--quant",
        type=one_or_more("none", "int8", "fp8"),
        default=["none"],
        metavar="KIND,…",
        help="the frozen linear layers' weights: none, int8, fp8 (default: none)",
    )
    parser.add_argument(
        "--remat",
        type=one_or_more("none", "full", "attention", "outputs", "qkv", "dots"),
        metavar="POLICY,…",
        help="what the backward pass computes again, training only: none, full (all of a block), "
        "attention (all but attention), outputs (all but attention and the products that end a branch), qkv (all but "
        "those, q, k and v), dots (all but products and attention) (default: none; full for kontext)",
    )
    parser.add_argument(
        "--moments",
        type=one_or_more("float32", "bfloat16", "int8"),
        metavar="KIND,…",
        help="AdamW's moments, training only: float32, bfloat16, int8 (default: float32)",
    )
    parser.add_argument(
        "--unroll", type=positive, metavar="N", help="blocks compiled side by side (default: 1; 8 for tiny)"
    )
    parser.add_argument(
        "--unstacked",
        action="store_true",
        help="give each block arrays of its own, as edit's --unstacked and --config.unstacked do",
    )
    parser.add_argument(
        "--attention",
        choices=["auto", "xla", "cudnn", "pallas"],
        default="auto",
        help="implementation; auto times those that the device has at this shape and takes the fastest",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU cores and threads of every row (default: all there are)"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave the diffusers rows out")
    parser.add_argument("--json", type=nonempty_path, metavar="PATH", help="write everything measured here as well")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of the same name")
    return parser.parse_args()


def make_variants(args: argparse.Namespace) -> list:
    """The Settings that the arguments ask for, the first to be measured most; UserError for those that contradict
    each other."""
    from benchmark.setting import DEFAULTS, Setting

    given = vars(args) | {"dtype": args.dtype or ("bfloat16" if args.size == "kontext" else "float32")}
    defaults = dict(zip(("tokens", "text_tokens", "batch", "remat", "unroll"), DEFAULTS[args.size, args.what]))
    given |= {name: given[name] or default for name, default in defaults.items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given["threads"] = args.threads or cores
    if given["threads"] > cores:
        raise UserError(f"--threads is {args.threads}, but only {cores} cores can be used; give at most {cores}", 2)
    if given["tokens"] % 2:
        raise UserError(f"--tokens is {args.tokens}; half are noisy and half conditioning, so give an even number", 2)
    for name in ("remat", "moments"):
        if getattr(args, name) and args.what == "sample":
            raise UserError(
                f"--{name} is of the backward pass and the optimizer, and sampling has neither; leave it "
                "out or give --what=train",
                2,
            )
    if args.attention == "cudnn" and given["dtype"] == "float32":
        raise UserError("cuDNN's attention has no float32; give --dtype=bfloat16 or --attention=xla", 2)
    if args.json:
        require_writable([args.json], overwrite=args.overwrite)
    varied = itertools.product(args.quant, args.remat or [defaults["remat"]], args.moments or ["float32"])
    return [
        Setting(**{name: values[name] for name in Setting.__dataclass_fields__})
        for values in (
            given | {"quantization": quantization, "remat": remat, "moments": moments}
            for quantization, remat, moments in varied
        )
    ]


def main() -> None:
    args = parse()
    # After the arguments, so that --help answers at once.
    from benchmark.run import run_benchmark
    from benchmark.table import table

    result = run_benchmark(make_variants(args), with_torch=not args.no_torch)
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    run_command(main)
