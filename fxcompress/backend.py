"""The backend: what ``torch.compile`` calls, and the switch for trainers with a closed list."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from fxcompress import report, rng, shares, torch_private
from fxcompress.automatic import automatic, record_part
from fxcompress.errors import FxCompressError
from fxcompress.evidence import Calibration
from fxcompress.kernels import cpu
from fxcompress.pipeline import Partitioner, Planned, Role, may_be_tried, shares_a_budget
from fxcompress.plan import Plan, merge
from fxcompress.planner import Given
from fxcompress.policies import policy
from fxcompress.replan import Replanner
from fxcompress.returned import when_backward_begins
from fxcompress.settings import Settings, make, split_options, update
from fxcompress.shares import Share
from fxcompress.whole import Graph, Whole

log = logging.getLogger("fxcompress")


class Backend:
    """A ``torch.compile`` backend; make one a model with :func:`backend`."""

    is_fxcompress_backend = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.partitioner = Partitioner(settings)
        self.whole = Whole()
        self.shares: dict[str, Share] = {}  # by name of a graph that was planned with others before
        self.plans: dict[str, None] = {}
        self.released: dict[str, bool] = {}  # by plan: its caller let go of what was returned
        self.__name__ = "fxcompress"

    def __call__(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one Dynamo graph.

        Args:
            mode, options: as ``torch.compile`` passes them on; our settings may be among the
                options, the rest go to Inductor.

        Raises:
            SettingsError: a bad setting. BudgetError: no plan fits.
        """
        ours, patches = split_options(options or {})
        try:
            settings = update(self.settings, ours)
        except FxCompressError as error:
            return _refusal(error)
        if settings.seed is not None:
            rng.use_setting(settings.seed, begin=False)
        again_wanted = settings.replan_every is not None and all(
            isinstance(x, torch.Tensor) for x in inputs
        )
        if self._shares_a_budget(inputs, settings):
            name = report.graph_key(module, inputs, _place(settings))
            if (share := self._share(name)) is not None:
                given, calibration = share
                settings = replace(settings, calibration=calibration)
                role = Role(given=given)
                return self._compile(module, inputs, settings, mode, patches, role)[0]
            is_early = torch_private.ends_in_break(module)
            if is_early or self.whole.graphs:
                role = Role(is_part=True, is_early=is_early)
                return self._compile_part(module, inputs, settings, mode, patches, role, name)
        kept = torch_private.copy_dynamo_graph(module) if again_wanted else module
        compiled, planned = self._compile(module, inputs, settings, mode, patches)
        if planned is None or not again_wanted:
            return compiled
        context = torch_private.compile_under_way()

        def again(
            settings: Settings, inputs: Sequence[Any], old: Planned
        ) -> tuple[Callable[..., Any], Planned | None]:
            self._forget(old)
            with torch_private.resumed(context):
                fresh = torch_private.copy_dynamo_graph(kept)
                return self._compile(fresh, inputs, settings, mode, patches)

        return _replanned(
            compiled, Replanner(kept, self.partitioner.settings_in_force, planned, again)
        )

    def _shares_a_budget(self, inputs: Sequence[Any], settings: Settings) -> bool:
        """Are the plans of the model's graphs, if it has several, to be made together?"""
        if not (shares_a_budget(settings) and torch.is_grad_enabled()):
            return False
        if torch_private.job_store() is not None:  # ranks that plan anew would have to agree again
            return False
        return all(isinstance(x, torch.Tensor) for x in inputs)

    def _share(self, name: str) -> tuple[Given, Calibration | None] | None:
        """What an earlier process gave this graph, when it planned a model's graphs together.

        One that it had not among them, before all of them were seen, is of another model.
        """
        found = shares.recall(name)
        if found is not None:
            self.shares[name] = found[0]
            return found[0].given, found[1]
        strangers = [s for s in self.shares.values() if not self.shares.keys() >= set(s.graphs)]
        if strangers:
            log.warning("graphs of this model were planned among others; a later run plans anew")
            for share in strangers:
                shares.forget(share)
            self.shares.clear()
        return None

    def _compile_part(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        settings: Settings,
        mode: str | None,
        patches: dict[str, Any],
        role: Role,
        name: str,
    ) -> Callable[..., Any]:
        """Compile one of several graphs that share the budget."""
        frame, context = torch_private.compile_id(), torch_private.compile_under_way()
        kept = torch_private.copy_dynamo_graph(module)
        compiled, planned = self._compile(module, inputs, settings, mode, patches, role)
        if planned is None:
            return compiled
        settings = self.partitioner.settings_in_force

        def again(
            inputs: Sequence[Any], given: Given, old: Planned
        ) -> tuple[Callable[..., Any], Planned | None]:
            self._forget(old)
            with torch_private.resumed(context):
                fresh = torch_private.copy_dynamo_graph(kept)
                part = Role(is_part=True, given=given)
                return self._compile(fresh, inputs, settings, mode, patches, part)

        return self.whole.add(Graph(settings, planned, compiled, again, role.is_early, name, frame))

    def _forget(self, old: Planned) -> None:
        """The graph is about to be compiled anew, by another plan."""
        self.plans.pop(old.plan.key(), None)
        self.partitioner.ledger.forget(old.plan.key())

    def _compile(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        settings: Settings,
        mode: str | None,
        patches: dict[str, Any],
        role: Role = Role(),  # noqa: B008 (frozen)
    ) -> tuple[Callable[..., Any], Planned | None]:
        """(what runs, what was decided if that is to be made again)."""
        if policy(settings.policy).solves and any(map(_trains_on_cpu, inputs)):
            cpu.start()  # while the graph is traced
        frame, ledger = torch_private.compile_id(), self.partitioner.ledger
        name = report.graph_key(module, inputs, Partitioner(settings, ledger).key())
        is_tried = may_be_tried(settings)
        kept = torch_private.copy_dynamo_graph(module) if is_tried else module
        calibration, step = automatic(module, inputs, settings, name)
        if calibration is not None:
            settings = replace(settings, calibration=calibration)
        if settings != self.partitioner.settings:
            self.partitioner = Partitioner(settings, ledger)
        self.partitioner.plans.clear()
        self.partitioner.planned, self.partitioner.role = None, role
        graph = report.graph_key(module, inputs, self.partitioner.key())
        self.partitioner.calibration = None
        if is_tried:
            self.partitioner.recorded = lambda: step or record_part(kept, inputs, settings)
        try:
            if settings.inner == "aot_eager":
                compiled = torch_private.compile_with_aot_eager(module, inputs, self.partitioner)
            else:
                patches = {
                    **_memory_options(settings),
                    **torch_private.mode_options(mode),
                    **patches,
                }
                again = self.partitioner.plans_again
                with torch_private.autograd_cache_off() if again else nullcontext():
                    compiled = torch_private.compile_with_inductor(
                        module, inputs, self.partitioner, patches
                    )
        except FxCompressError as error:
            return _refusal(error), None
        finally:
            self.partitioner.recorded = None  # with the inputs it holds
        if self.partitioner.plans:
            report.remember(graph, list(self.partitioner.plans))
        keys = list(self.partitioner.plans or report.recall(graph))
        for key in keys:
            self.plans[key] = None
            self.partitioner.ledger.learn(key, frame)
        return self._watch_first_call(compiled, keys, frame), self.partitioner.planned

    def _watch_first_call(
        self,
        compiled: Callable[..., Any],
        keys: list[str],
        frame: tuple[object, object] | None,
    ) -> Callable[..., Any]:
        """Learn from the first call which plan a graph has that came from the on-disk cache, and
        from the first backward whether the caller holds what the graph returned."""
        learned = seen = False

        def learn(plan_key: str) -> None:
            keys.append(plan_key)
            self.plans[plan_key] = None
            self.partitioner.ledger.learn(plan_key, frame)

        def run(*args: Any) -> Any:
            nonlocal learned
            if learned and seen:
                return compiled(*args)
            with nullcontext() if learned else report.listening(learn):
                result = compiled(*args)
            learned = True
            when_backward_begins(result, see)
            return result

        def see(released: bool) -> None:
            nonlocal seen
            seen = True
            self.released.update(dict.fromkeys(keys, released))

        if getattr(compiled, "_boxed_call", False):
            run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def __getstate__(self) -> dict[str, Any]:
        """Of a copied or pickled model: the partitioner is made anew, as it pickles as a key."""
        return {"settings": self.settings, "plans": dict(self.plans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]
        self.plans.update(state["plans"])

    def plan(self) -> Plan:
        """The plan of all graphs compiled so far.

        Raises:
            FxCompressError: nothing has been compiled for training yet.
        """
        if not policy(self.settings.policy).enabled:
            note = f"policy={self.settings.policy!r} leaves all as plain Inductor has it"
            return Plan(self.settings.policy, self.settings.budget_mb, (), 0, 0, note)
        return merge(self._as_it_runs(key) for key in self.plans)

    def _as_it_runs(self, key: str) -> Plan:
        """A plan, its peak without what its caller was seen to let go of."""
        plan = report.read(key)
        if not self.released.get(key) or plan.released_peak_bytes is None:
            return plan
        return replace(plan, planned_peak_bytes=plan.released_peak_bytes)

    def reset(self) -> None:
        """Forget what was compiled (``torch._dynamo.reset`` calls this)."""
        self.partitioner = Partitioner(self.settings)
        self.whole = Whole()
        self.shares.clear()
        self.plans.clear()
        self.released.clear()


def _trains_on_cpu(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and x.device.type == "cpu"


def _place(settings: Settings) -> str:
    """What a share depends on beside its graph."""
    return f"share|{torch.__version__}|{Partitioner(settings).key()}"


def _replanned(compiled: Callable[..., Any], replanner: Replanner) -> Callable[..., Any]:
    """``compiled``, and what it is replaced by as training goes."""
    current = compiled

    def run(*args: Any) -> Any:
        nonlocal current
        inputs = list(args)
        current = replanner.before(inputs) or current
        outputs = current(*args)
        replanner.after(inputs, outputs)
        return outputs

    return run


def _memory_options(settings: Settings) -> dict[str, Any]:
    """Inductor settings under which the peak is what is alive.

    Inductor keeps dead buffers for later ones of the same size. A GPT planned at 67 MB measured
    83 MB with that (4 bits, batch 16) and 71 MB without; the steps take as long.
    """
    return {"allow_buffer_reuse": False} if policy(settings.policy).enabled else {}


def _refusal(error: FxCompressError) -> Callable[..., Any]:
    """A compiled function that raises ``error`` as it is.

    Dynamo would wrap what a backend raises in its own ``BackendCompilerFailed``; what a compiled
    function raises reaches the user unchanged.
    """

    def refuse(*args: Any) -> Any:
        raise error

    return refuse


def backend(budget_mb: float | None = None, **settings: Any) -> Backend:
    """A ``torch.compile`` backend that trains within ``budget_mb`` megabytes of activations.

    Settings not given are read from ``FXCOMPRESS_*`` variables, then take their defaults.

    >>> import torch, fxcompress
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> compiled = torch.compile(model, backend=fxcompress.backend(budget_mb=4000))

    Args:
        budget_mb: see :class:`fxcompress.settings.Settings`, also for the other settings.

    Raises:
        SettingsError: an unknown setting or a value out of range.
    """
    if budget_mb is not None:
        settings["budget_mb"] = budget_mb
    made = make(**settings)
    if made.seed is not None:
        rng.use_setting(made.seed, begin=True)
    return Backend(made)


def fxcompress(
    module: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="fxcompress", options={…})``.

    Settings come from ``options`` over the ``FXCOMPRESS_*`` variables.
    """
    ours, rest = split_options(kwargs.pop("options", None) or {})
    try:
        settings = make(**ours)
    except FxCompressError as error:
        return _refusal(error)
    return _named(settings)(module, inputs, options=rest, **kwargs)


_by_settings: dict[Settings, Backend] = {}


def _named(settings: Settings) -> Backend:
    """One backend for each set of settings, so that the graphs of a model share a ledger."""
    return _by_settings.setdefault(settings, Backend(settings))


class Enabled:
    """What :func:`enabled` compiled; ask :meth:`plan`, or pass it to :func:`explain`."""

    is_fxcompress_backend = True

    def __init__(self, partitioner: Partitioner) -> None:
        self.partitioner = partitioner
        self.executed: dict[str, None] = {}

    def learn(self, plan_key: str) -> None:
        """Called with the plan of each rewritten graph that runs."""
        self.executed[plan_key] = None
        self.partitioner.ledger.learn(plan_key)

    def plan(self) -> Plan:
        """The plan of all graphs compiled or run so far.

        Raises:
            FxCompressError: none yet.
        """
        keys = {**self.partitioner.plans, **self.executed}
        return merge(report.read(key) for key in keys)


@contextmanager
def enabled(budget_mb: float | None = None, **settings: Any) -> Iterator[Enabled]:
    """Compress under the plain ``backend="inductor"`` while inside the ``with`` block.

    For trainers whose list of backends is closed (Accelerate's and so Hugging Face Trainer's). The
    compile happens at the first step, so the block must cover it; cover the whole training.

    Args, Raises: as :func:`backend`; a BudgetError is raised out of the block.
    """
    if budget_mb is not None:
        settings["budget_mb"] = budget_mb
    made = make(**settings)
    if made.seed is not None:
        rng.use_setting(made.seed, begin=True)
    found = Enabled(Partitioner(made))
    patches = {"custom_partitioner_fn": found.partitioner, **_memory_options(made)}
    with torch_private.inductor_patched(patches), report.listening(found.learn):
        try:
            yield found
        except Exception as error:
            inner = getattr(error, "inner_exception", None)  # of Dynamo's BackendCompilerFailed
            if isinstance(inner, FxCompressError):
                raise inner from None
            raise


def enable(budget_mb: float | None = None, **settings: Any) -> None:
    """Compress under the plain ``backend="inductor"`` from now on. See :func:`enabled`."""
    disable()
    _enabled.enter_context(enabled(budget_mb, **settings))


def disable() -> None:
    """Undo :func:`enable`."""
    _enabled.close()


_enabled = ExitStack()


def explain(compiled: Any = None) -> Plan:
    """What was done to each saved tensor, after the first training step.

    Args:
        compiled: a model or function compiled with our backend; None, or one compiled under
            :func:`enabled`: all graphs that ran in this process.

    Raises:
        FxCompressError: no training step has run yet.
    """
    found = None if compiled is None else torch_private.backend_of(compiled)
    if found is not None:
        plan: Plan = found.plan()
        return plan
    return merge(report.read(key) for key in report.executed())
