"""Models named on the command line, each with a batch of inputs and a loss."""

from __future__ import annotations

import ast
import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.errors import FxCompressError
from fxcompress.nn import convert_mlps, convert_resnet
from fxcompress.tools.model_names import near, suggestion

SPECS = """\
torchvision:NAME   a torchvision classifier, 10 classes, random images of size x size
cifar:resnet20     the small ResNet of examples/resnet.py, for 32 x 32 images
gpt:small          the GPT of examples/gpt.py (also tiny, base); size is the sequence length
hf:NAME            transformers: a model type (gpt2, vit, ...) or a folder with config.json, with
                   entries of its configuration as in hf:bert(num_hidden_layers=4,hidden_size=256)
NAME-ara, NAME-asa any of these with the auxiliary activations of fxcompress.nn
FILE.py:FUNCTION   FUNCTION(batch, size) -> (model, inputs, loss): a module, a tuple of its
                   arguments, and a function from its output to a scalar
"""


class ModelError(FxCompressError):
    """A model cannot be made; the message names the remedy."""


@dataclass(frozen=True)
class Task:
    """A model, one batch for it, and what to minimise."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Any], Tensor]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None  # of a classifier's batch, where they are known

    def forward(self, model: Callable[..., Any] | None = None) -> Tensor:
        """The loss of the batch, through `model` (a copy, or compiled) or the task's own."""
        called = self.model if model is None else model
        return self.loss(called(*self.inputs, **self.keywords))

    def held(self) -> list[Tensor]:
        """Tensors alive whatever the graph saves: parameters, buffers and inputs."""
        given = [*self.inputs, *self.keywords.values()]
        tensors = [value for value in given if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *tensors]

    def copy(self) -> Task:
        """The same batch with a copy of the model: equal weights, separate from now on."""
        return replace(self, model=copy.deepcopy(self.model))


def load(spec: str, batch: int, size: int, device: str = "cpu") -> Task:
    """The task a specification names (see `SPECS`), in training mode, all made on the device.

    Raises:
        ModelError: unknown specification, or something it needs is missing.
    """
    kind, _, name = spec.rpartition(":")
    if not kind or not name:
        raise _unknown(spec)
    if batch < 1 or size < 1:
        raise ModelError(f"--batch {batch} and --size {size} must be 1 or more")
    name, auxiliary = _auxiliary(name)
    makers = {"torchvision": _torchvision, "cifar": _cifar, "gpt": _gpt, "hf": _huggingface}
    with torch.device(device):
        if kind in makers:
            task = makers[kind](name, batch, size)
        elif kind.endswith(".py"):
            task = _from_file(Path(kind), name, batch, size)
        else:
            raise _unknown(spec)
    if auxiliary is not None:
        auxiliary(task.model)
    task.model.train()
    return replace(task, name=spec)


def _auxiliary(name: str) -> tuple[str, Callable[[nn.Module], nn.Module] | None]:
    """The model's name, and what converts it if the name asks for auxiliary activations."""
    bare, _, kind = name.rpartition("-")
    convert = {"ara": convert_resnet, "asa": convert_mlps}.get(kind)
    return (bare, convert) if bare and convert else (name, None)


def _unknown(spec: str) -> ModelError:
    hint = suggestion(spec)
    return ModelError(f"model {spec!r} is not understood{hint or '; give one of:'}\n{SPECS}")


def warm(task: Task, steps: int, lr: float = 0.01) -> None:
    """A few plain SGD steps: some models' gradients are degenerate at random weights."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        task.forward().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _torchvision(name: str, batch: int, size: int) -> Task:
    try:
        import torchvision
    except ImportError as error:
        raise ModelError("torchvision is missing: pip install 'fxcompress[bench]'") from error
    try:
        entries = {"image_size": size} if name.startswith("vit_") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **entries)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"torchvision has no classifier {name!r} ({error}); "
            f"torchvision.models.list_models() lists them{suggestion(f'torchvision:{name}')}"
        ) from error
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    return Task(name, model, (images,), lambda logits: F.cross_entropy(logits, labels))


def _gpt(name: str, batch: int, size: int) -> Task:
    module = _example("gpt")
    if name not in {"tiny", "small", "base"}:
        raise ModelError(f"examples/gpt.py has no gpt:{name}; use gpt:tiny, gpt:small or gpt:base")
    config = replace(getattr(module, name)(), block=size)
    tokens = torch.randint(config.vocabulary, (2, batch, size))
    return Task(name, module.GPT(config), (tokens[0], tokens[1]), lambda loss: loss)


def _cifar(name: str, batch: int, size: int) -> Task:
    made = getattr(_example("resnet"), name, None)
    if made is None or not name.startswith("resnet"):
        raise ModelError(f"examples/resnet.py has no {name!r}; use cifar:resnet20")
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    return Task(name, made(), (images,), lambda logits: F.cross_entropy(logits, labels))


def _example(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.py"
    if not path.is_file():
        raise ModelError(
            f"this model lives in examples/{name}.py, and {path} is not there: install from a "
            "clone of the repository with pip install -e ."
        )
    return _module(path)


def _huggingface(name: str, batch: int, size: int) -> Task:
    try:
        import transformers as installed
    except ImportError as error:
        raise ModelError("transformers is missing: pip install 'fxcompress[hf]'") from error
    transformers: Any = installed
    name, entries = _entries(name)
    try:
        if name in transformers.CONFIG_MAPPING:
            config = transformers.AutoConfig.for_model(name, **entries)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **entries)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"transformers has no configuration for {name!r}: give a model type such as gpt2, or "
            f"a folder with config.json ({error}){suggestion(f'hf:{name}')}"
        ) from error
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        model = transformers.AutoModelForCausalLM.from_config(config)
        tokens = torch.randint(config.vocab_size, (batch, size))
        keywords = {"input_ids": tokens, "labels": tokens}
    elif type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        config.image_size, config.num_labels = size, 10
        model = transformers.AutoModelForImageClassification.from_config(config)
        images = torch.randn(batch, config.num_channels, size, size)
        keywords = {"pixel_values": images, "labels": torch.randint(10, (batch,))}
    else:
        raise ModelError(
            f"hf:{name} is neither a causal language model nor an image classifier; write "
            "FUNCTION(batch, size) in a file and give FILE.py:FUNCTION"
        )
    return Task(name, model, (), lambda output: output.loss, keywords)


def _entries(name: str) -> tuple[str, dict[str, Any]]:
    """ "bert(hidden_size=256)" as the name and what stands in brackets."""
    bare, bracket, rest = name.partition("(")
    if not bracket:
        return bare, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        return bare, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ModelError(f"{name!r} is not of the form NAME(KEY=VALUE,...)") from error


def _from_file(path: Path, name: str, batch: int, size: int) -> Task:
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give FILE.py:FUNCTION with a path that exists")
    module = _module(path)
    factory = getattr(module, name, None)
    if not callable(factory):
        named = {n: f"{path}:{n}" for n, f in vars(module).items() if isinstance(f, FunctionType)}
        hint = near(name, named) or "; give FILE.py:FUNCTION"
        raise ModelError(f"{path} has no function {name!r}{hint}")
    made = factory(batch, size)
    if not (
        isinstance(made, tuple)
        and len(made) == 3
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], tuple)
        and callable(made[2])
    ):
        raise ModelError(
            f"{name}(batch, size) in {path} must return (model, inputs, loss): a module, a tuple "
            "of its arguments, and a function from its output to a scalar"
        )
    return Task(name, *made)


def _module(path: Path) -> ModuleType:
    """The module in a file, run anew."""
    # Registered under its own name: dataclasses and Dynamo look a class's module up by name.
    name = f"fxcompress_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
