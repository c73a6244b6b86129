"""The `fxcompress` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from typing import Any

# Kineto, which counts allocations for us, logs to the terminal by default. It reads this when
# PyTorch is imported, so it stands above every import of ours.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from fxcompress.errors import FxCompressError
from fxcompress.tools import (
    bench_accuracy,
    bench_batch,
    bench_budget,
    bench_codecs,
    bench_kernels,
    bench_noise,
    bench_soak,
    bench_step,
    bench_zeros,
    completion,
    demo,
    doctor,
    dump,
    max_batch,
    pareto_command,
    plan_command,
    study,
    viz_command,
)

EPILOG = """\
exit codes: 0 done, 1 a check failed, 2 the input cannot be used, 3 an unexpected error,
            130 interrupted
`fxcompress COMMAND --help` has examples. Output is plain text in a pipe; NO_COLOR is respected.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code; errors are one message on stderr."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except FxCompressError as error:
        if args.debug:
            raise
        print(f"fxcompress: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fxcompress dump … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        text = f"{type(error).__name__}: {error}"
        print(f"fxcompress: {text}\n(--debug shows where this happened)", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxcompress",
        description="Train in less memory: compressed saved activations.",
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "demo", demo, "train a small ResNet, plain beside compressed")
    _add(commands, "plan", plan_command, "what would become of a model's saved tensors")
    _add(commands, "dump", dump, "precision of every saved tensor; what changed between two plans")
    _add(commands, "viz", viz_command, "a plan as a page, a drawing, or data for other viewers")
    _add(commands, "pareto", pareto_command, "what less memory costs in noise and time")
    _add(commands, "max-batch", max_batch, "the largest batch that a budget allows")
    _add(commands, "study", study, "each saved tensor alone at few bits: its gradient error")
    _add(commands, "doctor", doctor, "what works on this machine, and what to do about the rest")

    benches = commands.add_parser("bench", help="benchmarks").add_subparsers(
        required=True, metavar="BENCH"
    )
    _add(benches, "step", bench_step, "memory, time and gradient error of a training step")
    _add(benches, "budget", bench_budget, "whether budgets hold: planned and measured peaks")
    _add(benches, "batch", bench_batch, "the largest batch within a peak, found by measuring")
    _add(benches, "noise", bench_noise, "gradient noise of each policy at equal saved bytes")
    _add(benches, "zeros", bench_zeros, "what exact zeros in the saved tensors would save")
    _add(benches, "accuracy", bench_accuracy, "train with several policies, over several seeds")
    _add(benches, "soak", bench_soak, "thousands of steps: memory, time and peak stay as they were")
    _add(benches, "codecs", bench_codecs, "error of every codec beside the rate–distortion bound")
    _add(benches, "kernels", bench_kernels, "GPU kernels as compiled, CPU kernels as measured")

    _add(commands, "completion", completion, "a script that completes commands in bash or zsh")
    command = commands.add_parser("version", help="print the version")
    command.set_defaults(run=_version, debug=False)
    return parser


def _add(commands: Any, name: str, module: Any, summary: str) -> None:
    """A command: a module with `add_arguments`, `run`, and perhaps `EXAMPLES`."""
    command = commands.add_parser(
        name,
        help=summary,
        description=module.__doc__.partition("\n")[0],
        epilog=getattr(module, "EXAMPLES", None),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    module.add_arguments(command)
    command.add_argument("--debug", action="store_true", help="errors with their traceback")
    command.set_defaults(run=module.run if hasattr(module, "run") else _complete)


def _complete(args: argparse.Namespace) -> int:
    print(completion.script(_parser(), args.shell), end="")
    return 0


def _version(args: argparse.Namespace) -> int:
    print(f"fxcompress {importlib.metadata.version('fxcompress')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
