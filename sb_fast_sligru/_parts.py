"""Modules by a key of a YAML, and whether their parts are still those that SpeechBrain built."""

from torch import nn
from torch.nn.utils import parametrize


def is_plain(module, kind):
    """Tell whether calling `module` computes what `kind` does, and nothing else sees the call.

    Weights of a class that holds other tensors (torchao's quantised ones) are the call's alone.
    """
    if not isinstance(module, kind):
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    is_kind = parametrize.type_before_parametrizations(module) is kind
    if not is_kind or "forward" in module.__dict__ or any(hooks):
        return False
    # Of the class: torch.compile finds the method there alone.
    return not any(hasattr(type(p), "__tensor_flatten__") for p in module._parameters.values())


def not_plain(name, part, expected):
    """Say so, of the part `name`, where the kernels need what is `expected`."""
    kind = type(part)
    return (
        f"{name} is {kind.__module__}.{kind.__qualname__}, the kernels need {expected} "
        "without hooks or quantised weights (torch.nn.utils.parametrize and FSDP around whole "
        "layers leave it so)"
    )


def build_module(key, cls, arguments):
    """Build a module of the class that a YAML has under `key`; ValueError if it is none."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{key} must be a class of modules, but is {cls!r}")
    return cls(**arguments)
