"""VGG-19, the reference of He et al. 2015 (figure 3, left), with torchvision's parameter names.

It is configuration E of Simonyan & Zisserman 2015, arXiv:1409.1556; with BN, torchvision's
vgg19_bn.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.models.depths import Net
from resnet_dist.models.dropout import KeyedDropout
from resnet_dist.models.residual import initialize

STAGE_CHANNELS = (64, 128, 256, 512, 512)
MAP_PX = 7  # size of the last map for 224-pixel images; the first linear layer reads all of it


class Vgg(nn.Module):
    """[B, 3, H, W] -> logits [B, num_classes]; H and W are 224 in training.

    The dropout of 0.5 is part of VGG; the residual nets have none.
    """

    def __init__(self, net: Net, num_classes: int, zero_init_last_gamma: bool = False):
        super().__init__()
        self.features = nn.Sequential(*_features(net.depths, with_bn=net.block == "conv_bn"))
        self.avgpool = nn.AdaptiveAvgPool2d(MAP_PX)
        self.classifier = nn.Sequential(
            nn.Linear(512 * MAP_PX * MAP_PX, 4096),
            nn.ReLU(inplace=True),
            KeyedDropout(layer=1),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            KeyedDropout(layer=2),
            nn.Linear(4096, num_classes),
        )
        initialize(self, zero_init_last_gamma)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)  # as in VGG, section 3.1
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        # At 224 pixels the pooling would change nothing, so it is skipped: its backward pass has no
        # deterministic form.
        if x.shape[2:] != (MAP_PX, MAP_PX):
            x = self.avgpool(x)
        # Flattened in NCHW order: a row of the first linear layer's weight is [512, 7, 7].
        return self.classifier(torch.flatten(x, 1))

    def dense(self, x: Tensor) -> Tensor:
        """Fully convolutional test (VGG, section 3.2): the linear layers slide over the map as
        convolutions, and the scores are averaged over it.

        [B, 3, H, W], with H and W at least 224 -> logits [B, num_classes].
        """
        linear = [layer for layer in self.classifier if isinstance(layer, nn.Linear)]
        # The first linear layer becomes a 7x7 convolution, the others 1x1 convolutions.
        x, kernel_px = self.features(x), MAP_PX
        for layer in linear[:-1]:
            kernel = layer.weight.view(layer.out_features, -1, kernel_px, kernel_px)
            x, kernel_px = F.relu(F.conv2d(x, kernel, layer.bias)), 1
        last = linear[-1]
        return F.conv2d(x, last.weight[:, :, None, None], last.bias).mean((2, 3))


def _features(depths: tuple[int, ...], with_bn: bool) -> Iterator[nn.Module]:
    in_channels = 3
    for channels, convolutions in zip(STAGE_CHANNELS, depths, strict=True):
        for _ in range(convolutions):
            yield nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
            if with_bn:
                yield nn.BatchNorm2d(channels)
            yield nn.ReLU(inplace=True)
            in_channels = channels
        yield nn.MaxPool2d(kernel_size=2, stride=2)
