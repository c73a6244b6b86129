"""Together: Inductor's C++ kernels for a graph, compiled a few files at a time.

Inductor compiles each loop as a file of its own. That takes GCC 0.4 s before it sees the loop and
0.05 s for the loop (Zen 4, headers precompiled), and a rewritten graph has more of them than a
plain one: the 75 of a ResNet-18 took 29 of the 52 s of its first step, and take 5 s as two files.

The code that Inductor writes for one of our graphs asks this module for its kernels instead. What
is compiled, how, and where it is kept stay Inductor's: only the files are longer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fxcompress import torch_private

log = logging.getLogger("fxcompress")

MOST = 48  # kernels a file, for GCC's memory
_ASKS = "async_compile = AsyncCompile()"
_ASKS_US = "from fxcompress.together import Together; async_compile = Together()"
_SIGNATURE = re.compile(r'extern "C"\s+void\s+kernel\(')
# Arguments of a call from Python are a tuple (torch 2.14) or an array (2.15).
_ITEMS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
static inline PyObject* fxcompress_item(PyObject* args, int n) { return PyTuple_GET_ITEM(args, n); }
static inline PyObject* fxcompress_item(PyObject* const* args, int n) { return args[n]; }
static inline PyObject* fxcompress_items(PyObject*, PyObject* tuple) { return tuple; }
static inline PyObject* const* fxcompress_items(PyObject* const*, PyObject* tuple) {
    return &PyTuple_GET_ITEM(tuple, 0);
}
"""


@dataclass(frozen=True)
class Kernel:
    """C++ source with a function `kernel`, and the types of its arguments."""

    arguments: tuple[str, ...]
    source: str


def ask_us(code: str) -> str:
    """The code of a graph, as Inductor writes it, with the kernels compiled together."""
    return code.replace(_ASKS, _ASKS_US)


class Together(torch_private.async_compile()):  # type: ignore[misc]
    """Inductor's way to compile a graph's kernels while it goes on, for the C++ ones."""

    def cpp_pybinding(self, argtypes: Sequence[str], source_code: str) -> Any:
        """Called for each kernel, and by `wait` replaced with what runs it."""
        kernel = Kernel(tuple(argtypes), source_code)
        if _SIGNATURE.search(source_code) is None:
            return super().cpp_pybinding(argtypes, source_code)
        return kernel

    def wait(self, scope: dict[str, Any]) -> None:
        """Called at the end of a graph's code with its names."""
        names = {name: value for name, value in scope.items() if isinstance(value, Kernel)}
        found = self._compiled(list(dict.fromkeys(names.values())))
        scope.update({name: found[kernel] for name, kernel in names.items()})
        super().wait(scope)

    def _compiled(self, kernels: Sequence[Kernel]) -> Mapping[Kernel, Any]:
        alone = super().cpp_pybinding
        threads = torch_private.compile_threads()
        files = in_files(kernels, threads)
        # Where nothing runs beside it, a submitted task would wait for a lock of its submitter.
        submit = self.submit if threads > 1 else None
        started = [(file, torch_private.start_cpp(*combined(file), submit)) for file in files]
        found: dict[Kernel, Any] = {}
        for file, result in started:
            try:
                call = result()
            except Exception as error:
                log.warning("C++ kernels are compiled one by one, not together: %s", error)
                found.update({k: alone(list(k.arguments), k.source) for k in file})
                continue
            found.update({k: partial(_call, call, i) for i, k in enumerate(file)})
        return found


def _call(call: Callable[[int, tuple[Any, ...]], None], number: int, *arguments: Any) -> None:
    call(number, arguments)


def in_files(kernels: Sequence[Kernel], threads: int) -> list[list[Kernel]]:
    """Kernels in files of about equal length: one a thread, or more where there are many."""
    count = min(max(threads, -(-len(kernels) // MOST)), len(kernels))
    files: list[list[Kernel]] = [[] for _ in range(count)]
    for kernel in sorted(kernels, key=lambda k: (-len(k.source), k.source)):
        min(files, key=lambda file: sum(len(k.source) for k in file)).append(kernel)
    return files


def combined(kernels: Sequence[Kernel]) -> tuple[str, str]:
    """(one source of all of them, the statement that calls the kernel of a number).

    The statement finds the number and a tuple of the kernel's arguments in `args`.
    """
    includes: dict[str, None] = {}
    bodies, cases = [], []
    for i, kernel in enumerate(kernels):
        lines = kernel.source.splitlines()
        includes.update(dict.fromkeys(line for line in lines if line.startswith("#include")))
        rest = "\n".join(line for line in lines if not line.startswith("#include"))
        own = _SIGNATURE.sub("__attribute__((noinline)) static void kernel(", rest)
        bodies.append(f"namespace fxcompress_{i} {{\n{own}\n}}")
        types = (argument.replace("const ", "") for argument in kernel.arguments)
        given = ", ".join(f"parse_arg<{t}>(given, {n})" for n, t in enumerate(types))
        cases.append(f"case {i}: fxcompress_{i}::kernel({given}); break;")
    number, given = "fxcompress_item(args, 0)", "fxcompress_items(args, fxcompress_item(args, 1))"
    statement = (
        f"auto given = {given}; "
        f"switch (PyLong_AsLong({number})) {{ {' '.join(cases)} }} Py_RETURN_NONE;"
    )
    return "\n".join([*includes, _ITEMS, *bodies]), statement
