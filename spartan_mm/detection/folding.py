"""BatchNorms folded into the convolutions before them."""
from itertools import zip_longest

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution that stands right before it, for inference.

    A folded norm becomes an identity, so whatever calls it works on. Doing it again changes
    nothing.

    NOTE: mmcv's ``fuse_conv_bn`` does the same and more: it also folds where another layer stands
    between the two, and norms which are more than that, such as timm's with an activation inside.

    Args:
        module: Changed in place, all that is in it included.
    """
    names = list(module._modules)
    for name, following in zip_longest(names, names[1:]):
        conv, norm = module._modules[name], module._modules.get(following)
        if (type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
                and conv.out_channels == norm.num_features and norm.track_running_stats):
            module._modules[name] = fuse_conv_bn_eval(conv.eval(), norm.eval())
            module._modules[following] = nn.Identity()
        elif conv is not None:
            fold_batch_norms(conv)
