"""The full-size model's steps on one device: what they take as the code stands, and what variants of it take.

All programs are compiled first, side by side, from shapes; then each is timed, and the result written as it comes.
Random weights; one set of them serves all steps of a kind. `--tiny` rehearses on any machine.
"""

import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in list(Path(__file__).resolve().parents)[2::-1]]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
from measure import Weights, measure, measure_ceilings
from programs import GROUPS, all_programs, compile_all, setting_of
from results import START, Results, say

from lorweb_jax.common.command_line import Parser, nonempty_path

MEASURING = 0.38  # of the time is left for measuring, whatever is still being compiled then


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=nonempty_path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=230, help="end after this time (default: 230)")
    parser.add_argument("--groups", default=",".join(GROUPS), help="what is measured, in this order (default: all)")
    parser.add_argument("--only", default="", help="names of the programs, separated by ;, if not all of a group")
    parser.add_argument(
        "--after",
        type=nonempty_path,
        help="measure only once this file exists: compile meanwhile, beside what else has the device",
    )
    parser.add_argument("--threads", type=int, default=3, help="programs compiled side by side (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="the small base's sizes, to rehearse on any machine")
    args = parser.parse_args()
    results, deadline = Results(args.out / "speed.json"), START + args.seconds
    device, groups = jax.devices()[0], args.groups.split(",")
    results.put("machine", "device", f"{device.device_kind}, jax {jax.__version__}, {os.cpu_count()} cores")

    sample, train = setting_of("sample", args.tiny), setting_of("train", args.tiny)
    wanted = [program for program in all_programs(sample, train) if program.section in groups]
    if args.only:
        wanted = [program for program in wanted if program.name in args.only.split(";")]
    # The compiler times kernels on the device: programs that ran meanwhile would disturb it, and wait for it.
    ready = compile_all(wanted, results, deadline - MEASURING * args.seconds, args.threads)
    while args.after and not args.after.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    say("measuring")
    weights = Weights()
    for group in groups:
        if group == "ceilings":
            try:
                measure_ceilings(results, sample, train, deadline, args.tiny)
            except Exception as error:
                results.failed(group, error)
        for program in [program for program in ready if program.section == group]:
            if time.monotonic() > deadline - 6:
                results.put("skipped", f"{group} {program.name}", "no time to measure it")
                continue
            try:
                measure(program, weights, results, args.out, args.tiny)
            except Exception as error:
                results.failed(f"{group} {program.name}", error)
    results.put("machine", "seconds in all", round(time.monotonic() - START, 1))
    # Threads that still compile would hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
