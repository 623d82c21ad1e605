"""A student that ends in its teacher's classifier."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcore.taps import Tapped
from kdcore.types import Classifier

PROJECTOR = "projector"


class ReusedClassifier(nn.Module):
    r"""A network up to one of its layers, a projector, and the classifier of another, frozen.

    .. math:: \mathrm{logits} = W_t \, \mathrm{pool}(P(s)) + b_t

    The network and the projector are the ones given, not copies: what trains them trains this. The
    classifier is a copy; it and the network's own one, which nothing reads, are frozen. The
    teacher's map that the term ``simkd`` compares is the layer ``PROJECTOR``'s.

    Raises ValueError for a layer that the network does not have.

    Source: Chen and others 2022 (SimKD), arXiv:2203.14001, figure 1.
    """

    def __init__(
        self, net: nn.Module, layer: str, projector: nn.Module, classifier: Classifier
    ) -> None:
        super().__init__()
        self.student = Tapped(net, [layer])
        self.student.net.get_submodule(self.student.classifier).requires_grad_(False)
        self.layer = layer
        self.projector = projector
        # the last linear layer, so that Tapped finds it
        self.classifier = nn.Linear(classifier.weight.shape[1], classifier.weight.shape[0])
        self.classifier.load_state_dict(classifier._asdict())
        self.classifier.requires_grad_(False)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        projected = self.projector(self.student(image).features[self.layer])
        embedding = F.adaptive_avg_pool2d(projected, 1).flatten(1)
        logits: Tensor = self.classifier(embedding)
        return logits
