"""`fxcompress max-batch`: the largest batch whose training step can be planned within a budget."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from fxcompress.pareto import max_batch
from fxcompress.tools import models, plan_command
from fxcompress.tools.output import console

EXAMPLES = """\
examples:
  fxcompress max-batch gpt:small --size 256 --budget-mb 100
  fxcompress max-batch torchvision:resnet50 --size 224 --budget-mb 4000 --policy uniform4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress max-batch`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--budget-mb", type=float, required=True, help="peak of activations, MB")
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument("--batch", type=int, default=4, help="to begin with; any will do")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print the number of samples."""
    task = plan_command.task_of(args.model, args.batch, args.size, args.seed)
    batch: Any = dict(task.keywords) or task.inputs
    with Console(stderr=True).status("planning"):
        found = max_batch(task.model, batch, args.budget_mb, policy=args.policy)
    if args.json:
        given = {"model": args.model, "budget_mb": args.budget_mb, "policy": args.policy}
        print(json.dumps({**given, "max_batch": found}))
    else:
        console().print(f"{found} samples fit into {args.budget_mb:g} MB ({args.policy})")
    return 0
