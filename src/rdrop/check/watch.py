"""Watch a model run, and leave it exactly as it was."""

import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..passes import near

SAMPLE_SIZE = 4096
CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Leaves the model and the random numbers as they were before, whatever happens in the block.

    Put back: parameters, buffers, `.grad`, `requires_grad`, training flags, hooks and every other attribute of every
    submodule, the tensors, lists, tuples, sets and dicts in it included, at any depth; the random state of torch on
    every device, of `random`, and of numpy where it is loaded. Holds one copy of all these tensors meanwhile. Not seen:
    what the forward changes inside other objects.
    """
    with ExitStack() as stack:
        for restore in (*random_states(), *_contents(model)):
            stack.callback(restore)
        yield


class Watch:
    """Hooks on every submodule that compare what it returns: between the passes, between forwards, on recomputation.

    While it watches, parameters need no gradient: backward runs through the activations and reaches nobody's `.grad`,
    gradient hook or optimizer. Use inside `unchanged`.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model = model
        self.rows = rows
        self.samples: dict[str, list[Tensor]] = {}
        """What each module returned in the forward, thinned out, call by call."""
        self.passes_differ: set[str] = set()
        """The modules that returned different rows for the first and the second half of the batch."""
        self.recomputed_differently: list[str] = []
        """The modules that gradient checkpointing ran again in backward with another result."""
        self._in_backward = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        trainable = {name for name, module in self.model.named_modules() if _has_trainable_parameters(module)}
        for parameter in self.model.parameters():
            if parameter.is_leaf and parameter.requires_grad:
                parameter.requires_grad_(False)
                self._stack.callback(parameter.requires_grad_)
        for name, module in self.model.named_modules():
            if name in trainable:
                # First in line: a later hook may set requires_grad on the output itself, which then is a leaf.
                handle = module.register_forward_hook(lambda _m, _i, output: _with_gradient(output), prepend=True)
                self._stack.callback(handle.remove)
            self._stack.callback(module.register_forward_hook(self._record(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def backward(self, logits: Tensor) -> None:
        self._in_backward = True
        logits.float().sum().backward()  # type: ignore[no-untyped-call]

    def _record(self, name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = [tensor.detach() for tensor in _float_tensors(output)]
            samples = [tensor.flatten()[:: (tensor.numel() // SAMPLE_SIZE) | 1].clone() for tensor in tensors]
            if self._in_backward:
                if any(not _among(sample, self.samples.get(name, [])) for sample in samples):
                    self.recomputed_differently.append(name)
                return
            self.samples.setdefault(name, []).extend(samples)
            if any(differ(*tensor.chunk(2)) for tensor in tensors if tensor.dim() and tensor.shape[0] == self.rows):
                self.passes_differ.add(name)

        return record


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors differ by more than rounding: by more than `sqrt(eps)` of their size, as `near` has it.

    Not bitwise: equal rows at different places of a batch need not give equal bits.
    """
    if first.shape != second.shape:
        return True
    if first.numel() == 0:
        return False
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    unknown = first.isnan() & second.isnan()
    return not near(first.masked_fill(unknown, 0.0), second.masked_fill(unknown, 0.0), tolerance)


def _among(sample: Tensor, others: list[Tensor]) -> bool:
    return any(not differ(sample, other) for other in others)


def _float_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and not output.is_nested:
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _float_tensors(part)
    elif isinstance(output, Mapping):
        yield from _float_tensors(list(output.values()))


def _has_trainable_parameters(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.Module):
        own += parametrizations.parameters()
    return any(parameter.requires_grad for parameter in own)


def _with_gradient(output: Any) -> Any:
    """Returns the output as trained parameters would have made it: part of a graph."""
    if type(output) is tuple:
        return tuple(_with_gradient(part) for part in output)
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.requires_grad:
        return output
    return output.detach().requires_grad_().clone() if torch.is_grad_enabled() else output


def random_states() -> Iterator[Callable[[], object]]:
    """Yields for each generator of random numbers in use what puts it back as it is now."""
    python_state, cpu_state = random.getstate(), torch.get_rng_state()
    yield lambda: random.setstate(python_state)
    yield lambda: torch.set_rng_state(cpu_state)
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        numpy_state = numpy_random.get_state()
        yield lambda: numpy_random.set_state(numpy_state)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        cuda_states = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(cuda_states)
    if torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        xpu_states = torch.xpu.get_rng_state_all()
        yield lambda: torch.xpu.set_rng_state_all(xpu_states)
    if torch.backends.mps.is_available():
        mps_state = torch.mps.get_rng_state()
        yield lambda: torch.mps.set_rng_state(mps_state)


def _contents(model: nn.Module) -> Iterator[Callable[[], object]]:
    """Yields what puts back each tensor and container that an attribute of a submodule is or holds, at any depth.

    Attributes too are hooks, submodules, parameters, buffers and the training flag.
    """
    seen: set[int] = set()
    waiting: list[Any] = [vars(module) for module in model.modules()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield _content_of(value)
        elif type(value) in CONTAINERS:
            waiting.extend(value.values() if isinstance(value, dict) else value)
            if not isinstance(value, tuple):
                yield partial(_refill, value, value.copy())


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _content_of(tensor: Tensor) -> Callable[[], object]:
    content, requires_grad = tensor.detach().clone(), tensor.requires_grad
    grad = tensor.grad if tensor.is_leaf else None

    def restore() -> None:
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        # Untouched tensors are not written to: a graph built before the block must stay valid for its backward.
        if not _is_same(tensor.detach(), content):
            with torch.no_grad():
                tensor.copy_(content)

    return restore


def _is_same(tensor: Tensor, content: Tensor) -> bool:
    """Whether a tensor has its content still. Of sparse and nested ones torch cannot tell; then it is written again."""
    is_comparable = tensor.layout == content.layout == torch.strided and not tensor.is_nested
    return is_comparable and torch.equal(tensor, content)
