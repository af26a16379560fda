"""Products of a few rows with a weight, on all cores.

With one row or a few, `F.linear` leaves all but one core idle. The weight as it is stored, (out, in), is a batch of
as many pieces as there are cores, and a batched product spreads over them: the same dot products, read from the same
memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


# Above this number of rows `F.linear` is as fast.
MOST_ROWS = 12
# Up to this number, the product with the rows as columns is the faster of the two, whatever the shape.
FEW_ROWS = 2


def few_rows_product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable:
    """
    What `F.linear(x, weight, bias)` is for few rows, rounded otherwise.

    Args:
        weight: (out, in), contiguous; a view of it is kept, so that changes in place are seen.

    Returns:
        (rows, in) -> (rows, out), both contiguous.
    """
    out_size, in_size = weight.shape
    pieces = max(1, min(torch.get_num_threads(), out_size))
    rest = out_size % pieces
    split = weight[: out_size - rest].view(pieces, -1, in_size)
    transposed = split.transpose(1, 2)
    remainder = weight[out_size - rest :] if rest else None
    columns_up_to = MOST_ROWS if out_size >= in_size else FEW_ROWS

    def product(x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows > MOST_ROWS:
            return F.linear(x, weight, bias)
        if rows == 1:
            # (pieces, out / pieces, 1)
            y = torch.bmm(split, x.t().expand(pieces, in_size, 1)).view(1, -1)
        elif rows <= columns_up_to:
            # (pieces, out / pieces, rows) -> (rows, out)
            y = torch.bmm(split, x.t().expand(pieces, in_size, rows)).view(-1, rows).t().contiguous()
        else:
            # (pieces, rows, out / pieces) -> (rows, out)
            y = torch.bmm(x.expand(pieces, rows, in_size), transposed).transpose(0, 1).reshape(rows, -1)
        if remainder is not None:
            y = torch.cat((y, F.linear(x, remainder)), dim=1)
        return y if bias is None else y.add_(bias)

    return product
