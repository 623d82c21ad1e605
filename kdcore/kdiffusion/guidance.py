"""What the teacher's classifier makes of the student's estimate of its last feature."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcore.kdiffusion.bridge import Bridged
from kdcore.types import Classifier, Outputs


def target_guidance(bridged: Bridged, classifier: Classifier | None) -> Float[Tensor, ""]:
    r"""Mean squared difference of what the classifier says of the feature and of its estimate.

    .. math:: \frac{1}{BK} \big\| g(x_0) - g(\hat x_0) \big\|^2, \quad
        g(x) = W \, \mathrm{mean}_p \, \mathrm{ReLU}(x)

    for maps, taken before or after their activation; :math:`g(x) = W x` for embeddings. The
    estimate is the mean of all branches, in the teacher's units. The classifier's bias cancels.

    Raises ValueError where the teacher's outputs carry no classifier.

    Source: Yao and others 2024, equation 9, with the estimate where its poster prints a product,
    and with the mean over classes. For a stage that is not the last, the paper's next layer is a
    convolution, which is not among a teacher's outputs: only a last stage is guided.
    """
    if classifier is None:
        raise ValueError("guidance needs the teacher's classifier, and its outputs carry none")
    estimate = bridged.teacher.restore(bridged.estimates.mean(0))
    feature = bridged.teacher.restore(bridged.clean)
    if bridged.is_map:
        estimate, feature = F.relu(estimate), F.relu(feature)
    said = (estimate - feature).mean(2) @ classifier.weight.T
    return said.square().mean()


def guided_layer(teacher: Outputs, layers: Iterable[str]) -> str:
    """The layer whose channels the teacher's classifier reads; of several, the smallest map.

    Raises ValueError where there is none.
    """
    if teacher.classifier is None:
        raise ValueError(
            "guidance needs the teacher's classifier, and its outputs carry none; set guidance to 0"
        )
    width = teacher.classifier.weight.shape[1]
    shapes = {layer: tuple(teacher.features[layer].shape) for layer in layers}
    read = {name: shape for name, shape in shapes.items() if len(shape) != 3 and shape[1] == width}
    if not read:
        raise ValueError(
            f"guidance needs a layer of the teacher whose {width} channels its classifier reads, "
            f"got {shapes}; add such a pair of layers, or set guidance to 0"
        )
    return min(read, key=lambda name: math.prod(read[name][2:]))
