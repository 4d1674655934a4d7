"""How fast the transformer and the basis are on this machine, beside diffusers' in torch.

  tools/benchmark.py                                       the small base, one sampling step
  tools/benchmark.py --size=mid --what=train --threads=2   forward and backward of a 0.16 B model
  tools/benchmark.py --size=kontext                        FLUX.1 Kontext's real sizes, bfloat16: a GPU of 80 GB

Weights are random. First the ceilings are measured: the fastest matrix product and the fastest copy. Then each row
runs in a process of its own on the same cores, the rows taking turns so that drift hits all of them alike; rows that
don't fit in memory together run one after the other. Rows of "sample", one forward each:

  ours                                the plain transformer
  ours + basis, low-rank              with the basis beside every linear layer, coefficients computed beforehand
  ours + basis, folded                with one analogy's mix folded into the weights
  diffusers, also with torch.compile  FluxTransformer2DModel; skipped, with the reason, where it can't run

Rows of "train":

  ours, gradient of all weights       forward and backward, what the torch rows do too
  ours frozen, gradient of tokens     forward, and backward through frozen weights: training with nothing to train
  ours frozen, basis train step       router, forward, backward, clipping, AdamW on a float32 basis
  diffusers, also with torch.compile  gradient of all weights

Columns: the median over the repeats with the shortest and the longest; model FLOPs (matrix products counted from
shapes, what remat computes again left out) per second, and their share of the measured matmul ceiling; the largest
memory, of the GPU or, on a CPU, of the row's whole process, building and compiling included; compile time. Under the
table stand the basis's overhead over the plain base, and our time over torch's.
Needs jax, flax, optax and numpy; torch and diffusers where they are to be compared with.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorweb_jax.errors import UserError, run_command  # noqa: E402  (the path above comes first)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help", 2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "mid", "kontext"], default="tiny",
                        help="tiny: the small base, 2 + 6 blocks of width 128; mid: 4 + 8 of 768; "
                             "kontext: 19 + 38 of 3072 (default: tiny)")
    parser.add_argument("--what", choices=["sample", "train"], default="sample", help="default: sample")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of weights and computation (default: bfloat16 for kontext, else float32)")
    parser.add_argument("--tokens", type=positive, metavar="N",
                        help="noisy and conditioning tokens together, half of each (default: 32, 512; "
                             "8192 for kontext, 2048 in training)")
    parser.add_argument("--text-tokens", type=positive, metavar="N", help="default: 16, 128, 512")
    parser.add_argument("--batch", type=positive, metavar="N",
                        help="default: 1; in training 8 for tiny, 6 for kontext")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="of every row (default: 10)")
    parser.add_argument("--basis-size", type=positive, default=32, metavar="N",
                        help="members of the basis (default: 32)")
    parser.add_argument("--basis-rank", type=positive, default=4, metavar="R", help="of each (default: 4)")
    parser.add_argument("--remat", choices=["none", "dots", "full"],
                        help="what the backward pass computes again, training only (default: none; full for kontext)")
    parser.add_argument("--unroll", type=positive, metavar="N",
                        help="blocks compiled side by side (default: 1; 8 for tiny)")
    parser.add_argument("--attention", choices=["auto", "xla", "cudnn"], default="auto",
                        help="implementation; auto times both at this shape on a GPU and takes the faster")
    parser.add_argument("--threads", type=positive, metavar="N",
                        help="CPU cores and threads of every row (default: all there are)")
    parser.add_argument("--no-torch", action="store_true", help="leave the diffusers rows out")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here as well")
    return parser.parse_args()


def make_setting(args: argparse.Namespace):
    """The Setting that the arguments ask for; UserError for those that contradict each other."""
    from lorweb_jax.benchmark.setting import DEFAULTS, Setting

    given = vars(args) | {"dtype": args.dtype or ("bfloat16" if args.size == "kontext" else "float32")}
    for name, default in zip(("tokens", "text_tokens", "batch", "remat", "unroll"), DEFAULTS[args.size, args.what]):
        given[name] = given[name] or default
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given["threads"] = args.threads or cores
    if given["threads"] > cores:
        raise UserError(f"--threads is {args.threads}, but only {cores} cores can be used; give at most {cores}", 2)
    if given["tokens"] % 2:
        raise UserError(f"--tokens is {args.tokens}; half are noisy and half conditioning, so give an even number", 2)
    if args.remat and args.what == "sample":
        raise UserError("--remat says what a backward pass computes again and sampling has none; leave it out", 2)
    if args.attention == "cudnn" and given["dtype"] == "float32":
        raise UserError("cuDNN's attention has no float32; give --dtype=bfloat16 or --attention=xla", 2)
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"the folder of --json={args.json} is not there; make it first", 2)
    return Setting(**{name: given[name] for name in Setting.__dataclass_fields__})


def main() -> None:
    args = parse()
    # After the arguments, so that --help answers at once.
    from lorweb_jax.benchmark.run import run_benchmark
    from lorweb_jax.benchmark.table import table

    result = run_benchmark(make_setting(args), with_torch=not args.no_torch)
    if args.json:
        unfinished = args.json.with_name(args.json.name + ".unfinished")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(args.json)
    print(table(result))


if __name__ == "__main__":
    run_command(main)
