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


def few_rows_products(*layers: tuple[torch.Tensor, torch.Tensor | None]) -> Callable:
    """
    What `F.linear(x, weight, bias)` is for few rows and for each of these layers, rounded otherwise.

    Args:
        layers: weight (out, in), contiguous, and bias (out,) or `None`; the same `in` for all. Views of them are kept,
            so that changes in place are seen.

    Returns:
        (rows, in) -> a list of (rows, out), all contiguous.
    """
    in_size = layers[0][0].shape[1]
    cores = torch.get_num_threads()
    splits = [_split(weight, bias, cores) for weight, bias in layers]
    by_columns = [pieces.shape[1] * pieces.shape[0] >= in_size for pieces, _, _ in splits]

    def products(x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.shape[0]
        if rows > MOST_ROWS:
            return [F.linear(x, weight, bias) for weight, bias in layers]
        results = []
        # The rows as columns, for each piece the same: (cores, in, rows)
        columns = x.as_strided((cores, in_size, rows), (0, 1, in_size))
        for (pieces, rest, bias), has_many_outputs in zip(splits, by_columns):
            if rows == 1:
                # (cores, out / cores, 1)
                y = torch.bmm(pieces, columns).view(1, -1)
            elif rows <= FEW_ROWS or has_many_outputs:
                # (cores, out / cores, rows) -> (rows, out)
                y = torch.bmm(pieces, columns).view(-1, rows).t().contiguous()
            else:
                # (cores, rows, out / cores) -> (rows, out)
                y = torch.bmm(columns.transpose(1, 2), pieces.transpose(1, 2)).transpose(0, 1).reshape(rows, -1)
            if rest is not None:
                y = torch.cat((y, F.linear(x, rest)), dim=1)
            results.append(y if bias is None else y.add_(bias))
        return results

    return products


def _split(
    weight: torch.Tensor, bias: torch.Tensor | None, cores: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A weight as (cores, out / cores, in), the rows that are left over, and the bias."""
    out_size, in_size = weight.shape
    rest = out_size % cores
    pieces = weight[: out_size - rest].view(cores, -1, in_size)
    return pieces, weight[out_size - rest :] if rest else None, bias
