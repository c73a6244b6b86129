"""fxcompress: a torch.compile backend that trains in less memory.

torch.compile(model, backend=fxcompress.backend(budget_mb=4000))
"""

__version__ = "0.1.0"

import fxcompress.torch_private  # noqa: F401  (first: it refuses a PyTorch that we do not know)
from fxcompress.actnn import QModule, set_optimization_level
from fxcompress.backend import backend, disable, enable, enabled, explain
from fxcompress.calibrate import calibrate
from fxcompress.check import Check, check
from fxcompress.errors import BudgetError, CodecError, FxCompressError, SettingsError
from fxcompress.evidence import Calibration
from fxcompress.pareto import Point, max_batch, pareto
from fxcompress.plan import Plan, TensorPlan
from fxcompress.policies import policies
from fxcompress.region import policy
from fxcompress.rng import manual_seed, noise

__all__ = [
    "BudgetError",
    "Calibration",
    "Check",
    "CodecError",
    "FxCompressError",
    "Plan",
    "Point",
    "QModule",
    "SettingsError",
    "TensorPlan",
    "backend",
    "calibrate",
    "check",
    "disable",
    "enable",
    "enabled",
    "explain",
    "manual_seed",
    "max_batch",
    "noise",
    "pareto",
    "policies",
    "policy",
    "set_optimization_level",
]
