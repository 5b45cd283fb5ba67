"""Plain and residual nets in the ImageNet form (He et al. 2015, table 1), with torchvision's
parameter names."""

from torch import Tensor, nn

from resnet_dist.models.depths import Net
from resnet_dist.models.residual import BLOCKS, initialize, stage


class ImageNetNet(nn.Module):
    """[B, 3, H, W] -> logits [B, num_classes]; H and W are 224 in training.

    Larger images work too. Average pooling and the linear layer commute, so the logits are the mean
    over the last map of the outputs that a 1x1 convolution with the weights of `fc` would have:
    this is the paper's fully convolutional test.
    """

    def __init__(self, net: Net, num_classes: int, zero_init_last_gamma: bool = False):
        super().__init__()
        wide = BLOCKS[net.block][1]
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = stage(net.block, 64, 64, net.depths[0], net.shortcut)
        self.layer2 = stage(net.block, 64 * wide, 128, net.depths[1], net.shortcut)
        self.layer3 = stage(net.block, 128 * wide, 256, net.depths[2], net.shortcut)
        self.layer4 = stage(net.block, 256 * wide, 512, net.depths[3], net.shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * wide, num_classes)
        initialize(self, zero_init_last_gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # [B, 64, H/4, W/4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 512*wide, H/32, W/32]
        return self.fc(self.avgpool(x).flatten(1))
