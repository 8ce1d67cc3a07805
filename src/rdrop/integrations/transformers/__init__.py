"""R-Drop in the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING

try:
    import transformers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rdrop.integrations.transformers needs {error.name}, which is not installed; in a clone of the repository: "
        "pip install '.[transformers]'",
        name=error.name,
    ) from error

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 6):
    raise ImportError(
        f"rdrop.integrations.transformers needs transformers 5.6 or later, whose Trainer scales accumulated losses as "
        f"this code expects; version {transformers.__version__} is installed: pip install 'transformers>=5.6,<6'"
    )

from rdrop.integrations.targets import Target

if TYPE_CHECKING:
    from rdrop.integrations.transformers.durable import DurableCheckpoints
    from rdrop.integrations.transformers.nonfinite import FiniteUpdates, NonfiniteUpdateError
    from rdrop.integrations.transformers.trainer import RDropMixin, RDropSeq2SeqTrainer, RDropTrainer
else:

    def __getattr__(name: str) -> object:
        """Imports the trainers when they are first asked for: `forward` is of use without transformers' Trainer."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'trainer')}"), name)

    _MODULES = {"DurableCheckpoints": "durable", "FiniteUpdates": "nonfinite", "NonfiniteUpdateError": "nonfinite"}


__all__ = [
    "DurableCheckpoints",
    "FiniteUpdates",
    "NonfiniteUpdateError",
    "RDropMixin",
    "RDropSeq2SeqTrainer",
    "RDropTrainer",
    "Target",
]
