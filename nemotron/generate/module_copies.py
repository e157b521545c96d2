"""Modules made from others: with the same parameters, or with frozen ones."""

from torch import Tensor, nn


def copy_modules(module: nn.Module) -> nn.Module:
    """Return other modules with the same parameters, buffers, settings and operations."""
    new = module.__class__.__new__(module.__class__)
    take_over(new, module)
    for name, child in module.named_children():
        setattr(new, name, copy_modules(child))
    return new


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a module what another one holds: parameters, children, settings, operations."""
    for name, value in vars(old).items():
        vars(new)[name] = value.copy() if isinstance(value, dict) else value


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a parameter with the tensor's memory, which is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
