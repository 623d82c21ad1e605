"""VGG with BatchNorm for small pictures: five plain stages and one linear layer."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from kdcore.models.initialisation import draw_classifier, draw_convolutions


def vgg(convolutions: int, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Five stages of 3x3 ``convolutions``, widths 64, 128, 256, 512, 512; average pool; classifier.

    VGG-8 has one convolution a stage, VGG-13 two; both names count three linear layers, of which
    small pictures keep one. The first three stages end in a max-pool, the others do not, so that
    32x32 becomes 4x4.

    Layers: ``block0`` to ``block4``, each after its last ReLU and before its pool; the BatchNorm
    before that ReLU is ``block0.1`` of VGG-8 and ``block0.4`` of VGG-13. Parameter names are those
    of the checkpoints that circulate.

    Source: Simonyan & Zisserman 2015, arXiv:1409.1556, as in the code of Tian, Krishnan & Isola
    2020 (CRD), arXiv:1910.10699, which pools once more where pictures are 64x64.
    """
    widths = (in_channels, 64, 128, 256, 512, 512)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage in range(5):
        layers[f"block{stage}"] = _block(widths[stage], widths[stage + 1], convolutions)
        if stage < 3:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["pool4"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = classifier = nn.Linear(widths[-1], num_classes)
    net = nn.Sequential(layers)
    draw_convolutions(net, fan="fan_out")
    draw_classifier(classifier)
    return net


def _block(in_channels: int, out_channels: int, convolutions: int) -> nn.Module:
    layers: list[nn.Module] = []
    for number in range(convolutions):
        inside = in_channels if number == 0 else out_channels
        layers += [
            nn.Conv2d(inside, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
