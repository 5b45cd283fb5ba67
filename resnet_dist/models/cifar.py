"""Plain and residual nets in the CIFAR form: 6n+2 layers (He et al. 2015, section 4.2)."""

from torch import Tensor, nn

from resnet_dist.models.depths import Net
from resnet_dist.models.residual import conv3x3, initialize, stage


class CifarNet(nn.Module):
    """[B, 3, H, W] -> logits [B, num_classes]; H and W are 32 in the paper.

    Parameters of the residual nets for 10 classes (table 6): 0.27 M (20 layers), 0.46 M (32),
    0.66 M (44), 0.85 M (56), 1.7 M (110), 19.4 M (1202). The plain nets have as many, because
    shortcuts of option A have no parameters.
    """

    def __init__(self, net: Net, num_classes: int, zero_init_last_gamma: bool = False):
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(net.block, 16, 16, net.depths[0], net.shortcut)
        self.layer2 = stage(net.block, 16, 32, net.depths[1], net.shortcut)
        self.layer3 = stage(net.block, 32, 64, net.depths[2], net.shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialize(self, zero_init_last_gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # [B, 16, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 64, H/4, W/4]
        return self.fc(self.avgpool(x).flatten(1))
