"""Where weights lie in memory, which decides how some products round."""

from collections.abc import Callable

import torch


# What torch gives a fresh CPU tensor.
ALIGNMENT = 64


def lay_alike(*models: torch.nn.Module) -> Callable[[], None]:
    """
    Move the weights of models to where fresh tensors begin, so that equal weights give equal bits.

    `from_pretrained` leaves weights where the file's header, which is as long as the names in it, happens to put them:
    off the border of 64 bytes at which memory for fresh tensors begins. On x86 CPUs a product of one row in float32
    then sums in another order.

    Parameters and buffers stay the objects they are, with their gradients, hooks and optimizer states; those that share
    their memory share the new one. What lies well already is not touched.

    Returns:
        a function that puts everything back to where it lay, with the values that it has then.
    """
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []
    fresh: dict[tuple, torch.Tensor] = {}
    for model in models:
        # A tied parameter comes once.
        for tensor in (*model.parameters(), *model.buffers()):
            data = tensor.data
            # Those without memory of their own (meta, distributed, quantised ones) have no place to be moved from.
            if type(data) is not torch.Tensor or data.layout != torch.strided or data.data_ptr() % ALIGNMENT == 0:
                continue
            place = (data.data_ptr(), data.dtype, data.shape, data.stride())
            if place not in fresh:
                fresh[place] = data.clone()
            tensor.data = fresh[place]
            moved.append((tensor, data))

    def put_back() -> None:
        for tensor, data in moved:
            # A file's pages stay the file's where there is nothing to write.
            if not torch.equal(data, tensor.data):
                data.copy_(tensor.data)
            tensor.data = data

    return put_back
