"""Whether modules that are passed by are still what they were when a step was built around them."""

from collections.abc import Iterable
from operator import is_

import torch
from torch import nn
from torch.nn.modules import module as torch_module


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's `forward` and nothing else."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ or module._backward_hooks
    )


def has_global_hooks() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class Watch:
    """
    What a step relies on in the modules that it does not call.

    Seen at every step: a module that another took the place of, a hook, a parameter that was set anew or moved to
    another memory. Seen where a cache is new: any other attribute. A weight that is changed in place needs no
    watching, since the step reads it where it lies.

    Args:
        modules: those that the step passes by.
        holders: those of which the children and hooks alone matter.
    """

    def __init__(self, modules: Iterable[nn.Module], holders: Iterable[nn.Module]):
        modules = list(dict.fromkeys(modules))
        everything = list(dict.fromkeys([*modules, *holders]))
        self.hooks = [hooks for module in everything for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.children = [(module._modules, dict(module._modules)) for module in everything if module._modules]
        self.parameters = [
            (module._parameters, name, parameter, parameter.data_ptr())
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.attributes = [(module, type(module), list(module.__dict__.values())) for module in modules]

    def agrees(self, thoroughly: bool) -> bool:
        """Whether all is as it was; `thoroughly` looks at every attribute."""
        if any(self.hooks) or has_global_hooks():
            return False
        for children, known in self.children:
            if children != known:
                return False
        for parameters, name, known, address in self.parameters:
            if parameters.get(name) is not known or known.data_ptr() != address:
                return False
        if not thoroughly:
            return True
        for module, known_class, values in self.attributes:
            now = module.__dict__.values()
            if type(module) is not known_class or len(now) != len(values) or not all(map(is_, now, values)):
                return False
        return True


def is_readable(weight: torch.Tensor | None) -> bool:
    """Whether a step may read a parameter where it lies: plain, float32, dense, on the CPU."""
    return weight is None or (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.is_contiguous()
    )
