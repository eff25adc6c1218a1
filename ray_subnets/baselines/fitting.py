"""Does a network that a method has changed still answer, each image for itself?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ray_subnets.data import Data
from ray_subnets.inputs import made_up


@torch.no_grad()
def check_members(model: nn.Module, members: int, data: Data, what: str, fits: str) -> None:
    """Try the changed network on random images, in evaluation mode.

    Args:
        what: the method, for messages.
        fits: which networks do.

    Raises:
        ValueError: it cannot run, or its answers `(M, N, C)` are not those of single images.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = made_up(3, data.input_shape, data.input_dtype, generator).to(device)
    try:
        together, alone = model(x), model(x[1:2])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{what}: this network does not run as several members ({reason}); {fits}"
        ) from None
    finally:
        model.train(training)
    if not isinstance(together, Tensor) or together.shape != (members, 3, data.num_classes):
        raise ValueError(f"{what}: this network does not give logits for each member; {fits}")
    torch.nan_to_num_(together), torch.nan_to_num_(alone)
    if float((together[:, 1:2] - alone).abs().max()) > 1e-3 * float(alone.abs().max()):
        raise ValueError(f"{what}: in this network images see each other; {fits}")
