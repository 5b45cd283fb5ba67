"""The one table of depths: residual blocks per stage (He et al. 2015, table 1 and section 4.2).

Four stages make the ImageNet form, three the CIFAR form (6n+2 layers, n blocks per stage).
Only the standard library is imported here: configs are checked where torch is absent.
"""

DEPTHS: dict[str, tuple[str, tuple[int, ...]]] = {
    # ImageNet: block, blocks per stage of 64, 128, 256 and 512 channels (bottlenecks put out 4x)
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
    # CIFAR: layers = 6n + 2, stages of 16, 32 and 64 channels
    "resnet20": ("basic", (3, 3, 3)),
    "resnet32": ("basic", (5, 5, 5)),
    "resnet44": ("basic", (7, 7, 7)),
    "resnet56": ("basic", (9, 9, 9)),
    "resnet110": ("basic", (18, 18, 18)),
    "resnet1202": ("basic", (200, 200, 200)),
}
