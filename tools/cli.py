"""The `fxcompress` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys

# Kineto, which counts allocations for us, logs to the terminal by default. It reads this when
# PyTorch is imported, so it stands above every import of ours.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from fxcompress.errors import FxCompressError
from fxcompress.tools import bench_kernels, bench_noise, bench_step, demo


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 2 when the input cannot be used, with a message on stderr."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except FxCompressError as error:
        print(f"fxcompress: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxcompress", description="Train in less memory: compressed saved activations."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="train a small ResNet, plain beside compressed")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    benches = commands.add_parser("bench", help="benchmarks").add_subparsers(
        required=True, metavar="BENCH"
    )
    command = benches.add_parser(
        "step",
        help="memory, time and gradient error of a training step",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    bench_step.add_arguments(command)
    command.set_defaults(run=bench_step.run)

    command = benches.add_parser(
        "noise",
        help="gradient noise of each policy at equal saved bytes",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    bench_noise.add_arguments(command)
    command.set_defaults(run=bench_noise.run)

    command = benches.add_parser("kernels", help="GPU kernels as compiled, CPU kernels as measured")
    bench_kernels.add_arguments(command)
    command.set_defaults(run=bench_kernels.run)

    command = commands.add_parser("version", help="print the version")
    command.set_defaults(run=_version)
    return parser


def _version(args: argparse.Namespace) -> int:
    print(f"fxcompress {importlib.metadata.version('fxcompress')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
