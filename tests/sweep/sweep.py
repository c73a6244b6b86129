"""Try every model of the sweep and write the table: python tests/sweep/sweep.py --help.

Each row is kept in a file of JSON lines as soon as it is known, so that a run can be cut off and
resumed. Trials run in worker processes; one that dies or hangs is a row, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import table  # noqa: E402
from subject import Subject  # noqa: E402
from trial import FAILED, Row, attempt  # noqa: E402

FAMILIES = {"module": "torch_modules", "transformers": "transformer_models", "vision": "vision"}
ROWS = HERE / "results.jsonl"
CHUNK = 40  # trials of one worker process


def main() -> int:
    args = _arguments()
    if args.worker:
        return _work(args.worker, args.inner, args.rows, predict=args.predict)
    if args.table:
        table.write(sorted(read(args.rows), key=lambda r: order(r.name)), HERE / "RESULTS.md")
        return 0
    names = [
        s.name
        for family in args.families
        for s in subjects(family)
        if (not args.match or args.match in s.name)
        and (args.inner != "inductor" or s.representative or args.match)
    ]
    done = set() if args.again else {r.name for r in read(args.rows) if r.inner == args.inner}
    todo = [n for n in names if n not in done]
    while todo:
        chunk, todo = todo[:CHUNK], todo[CHUNK:]
        todo = _supervise(chunk, args) + todo
    return _summary(r for r in read(args.rows) if r.inner == args.inner and r.name in set(names))


def order(name: str) -> tuple[int, str]:
    """Families as they are tried, names as people count."""
    family, _, rest = name.partition(":")
    numbered = re.sub(r"\d+", lambda n: n[0].zfill(4), rest)
    return list(FAMILIES).index(family), numbered


def subjects(family: str) -> list[Subject]:
    found: list[Subject] = importlib.import_module(FAMILIES[family]).subjects()
    return found


def read(path: Path) -> list[Row]:
    """The latest row of each model and inner compiler."""
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = Row(**json.loads(line))
            rows[row.name, row.inner] = row
    return list(rows.values())


def write(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def _work(names: Sequence[str], inner: str, path: Path, *, predict: bool) -> int:
    families = {n.partition(":")[0] for n in names}
    known = {s.name: s for f in families for s in subjects(f)}
    for name in names:
        print(f"start {name}", flush=True)
        row = attempt(known[name], inner, predict=predict)
        write(path, row)
        print(f"{row.status:14} {row.seconds:6.1f} s  {name}  {row.reason}", flush=True)
    return 0


def _supervise(names: list[str], args: argparse.Namespace) -> list[str]:
    """Run a worker over ``names``; those left to do if it died are returned."""
    command = [sys.executable, __file__, "--inner", args.inner, "--rows", str(args.rows)]
    command += ["--predict"] * args.predict + ["--worker", *names]
    before = time.time()
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert worker.stdout is not None
    started, finished = "", 0
    for line in worker.stdout:
        if line.startswith("start "):
            started = line[6:].strip()
        elif started and started in line:
            finished += 1
            print(line, end="", flush=True)
    code = worker.wait()
    if code == 0 or not started:
        return []
    died = Row(started, args.inner, FAILED, f"the process died with code {code}")
    write(args.rows, died)
    print(f"{FAILED} {started}: {died.reason} after {time.time() - before:.0f} s", flush=True)
    return names[names.index(started) + 1 :]


def _summary(rows: Iterable[Row]) -> int:
    count: dict[str, int] = {}
    for row in rows:
        count[row.status] = count.get(row.status, 0) + 1
    print(", ".join(f"{n} {status}" for status, n in sorted(count.items())))
    return int(FAILED in count)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--match", default="", help="only models with this in their name")
    parser.add_argument("--inner", choices=("graphs", "aot_eager", "inductor"), default="graphs")
    parser.add_argument("--predict", action="store_true", help="calibrate, and predict the noise")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--table", action="store_true", help="only write RESULTS.md from the rows")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
