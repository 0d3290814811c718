"""The contrastive loss of SimCLR and SupCon.

    loss = SupConLoss(temperature=0.5)(features)           # SimCLR: [B, 2, 128] unit vectors
    loss = SupConLoss(temperature=0.5)(features, labels)   # SupCon
"""

import torch
from torch import nn

BASE_TEMPERATURE = 0.07


class SupConLoss(nn.Module):
    """Pull the positives of every view together and push all other views away.

    With z the B*V views, T the temperature, and P(i) the positives of view i (the other views of
    its image; with labels, of every image of its class), the loss is the mean over i of

        -(T / 0.07) * mean_{p in P(i)} [ z_i.z_p / T - log sum_{a != i} exp(z_i.z_a / T) ]

    Args:
        temperature: T > 0.

    Source: SSD paper, section 3, after Khosla et al. 2020, equation 2 ("out"). Same as the
    original, the factor T / 0.07 included (7.14 at T = 0.5): learning rates rest on it.
    """

    def __init__(self, temperature=0.5):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.temperature = temperature

    def forward(self, features, labels=None, rows=slice(None)):
        """Compute the loss of a batch, or one of the parts that it is the sum of.

        Args:
            features: float [B, V, D], V >= 2 views of each image, rows of unit length.
            labels: int64 [B], the classes (SupCon); None for SimCLR.
            rows: slice of the B images, those whose views are the i of the sum; the others' parts
                of the loss are computed by other processes.

        Returns: float scalar, a sum over i divided by B*V.

        Raises: ValueError: shapes other than these.
        """
        if features.dim() != 3 or features.shape[1] < 2:
            raise ValueError(f"features must be [B, V >= 2, D], not {list(features.shape)}")
        images, views = features.shape[:2]
        if labels is None:
            labels = torch.arange(images, device=features.device)
        elif labels.shape != (images,):
            raise ValueError(f"labels must be [{images}], not {list(labels.shape)}")

        z = features.transpose(0, 1).flatten(0, 1)  # [V*B, D], view after view
        y = labels.repeat(views)
        a = torch.arange(len(z), device=z.device)
        i = a.view(views, images)[:, rows].flatten()  # [n]
        z_i = z.view(views, images, -1)[:, rows].flatten(0, 1)  # [n, D]
        similarity = z_i @ z.T / self.temperature  # [n, V*B]
        itself = i[:, None] == a
        positive = (y[i, None] == y) & ~itself
        log_sum = similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1)
        attraction = (similarity * positive).sum(dim=1) / positive.sum(dim=1)
        part = (log_sum - attraction).sum() / len(z)
        return (self.temperature / BASE_TEMPERATURE) * part
