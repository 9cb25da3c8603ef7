"""Clusters of a prompt's samples, one of which holds the memorised image (Alberti et al., arXiv 2503.01034)."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


def split_clusters(features: Tensor, num_clusters: int, seed: int = 0) -> tuple[Tensor, float | None]:
    """Split features by k-means; return labels `(N,)` and the silhouette (Rousseeuw, 1987).

    The silhouette lies in [-1, 1] and is high where the clusters stand apart. Fewer distinct features than
    `num_clusters` make fewer clusters. If all features are equal, or there are no more of them than `num_clusters`,
    there is nothing to split: all labels are 0 and the silhouette is None.

    Args:
        features: `(N, D)`, finite; normalise them first if the network compares by cosine.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score

    points = features.double().cpu().numpy()
    if len(points) <= num_clusters:
        return torch.zeros(len(points), dtype=torch.long), None
    with warnings.catch_warnings():
        # A model that memorised an image gives duplicates of it, which k-means cannot split, and it warns of that.
        warnings.simplefilter("ignore", ConvergenceWarning)
        assigned = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(points)
    # Points closer than rounding may leave clusters without a member: number the others from 0.
    labels = torch.from_numpy(assigned).long().unique(return_inverse=True)[1]
    return labels, float(silhouette_score(points, labels.numpy())) if labels.any() else None


def memorized_cluster(features: Tensor, labels: Tensor, reference: Tensor | None = None) -> int:
    """Return the label of the cluster of copies.

    With a `reference` it is the cluster whose centre is nearest to it. Without one it is the tightest cluster: copies
    are alike, other pictures are not. A cluster of one is tight by definition and counts only if there is no other.

    Args:
        features: `(N, D)`, N at least 1.
        labels: `(N,)`.
        reference: `(D,)`, the feature of the memorised image.
    """
    clusters = {label: features[labels == label].double() for label in labels.unique().tolist()}
    centers = {label: members.mean(0) for label, members in clusters.items()}
    if reference is not None:
        return min(centers, key=lambda label: (centers[label] - reference).norm().item())
    candidates = [label for label, members in clusters.items() if len(members) > 1] or list(clusters)
    return min(candidates, key=lambda label: (clusters[label] - centers[label]).norm(dim=1).mean().item())


@dataclass(frozen=True)
class CopyCluster:
    """The paper's copy detector: a sample is a copy if the centre nearest to it is that of the memorised cluster.

    Here a copy must also lie within half of the distance of the two centres. Otherwise a sample that resembles neither
    cluster, such as the noise of a ruined model, would count as a copy half of the time.

    Args:
        centers: `(K, D)`, of k-means on samples of the model that memorised the image.
        memorized: the row of the centre nearest to the image.
        silhouette: of the clusters; low where there is nothing to tell apart.
    """

    centers: Tensor
    memorized: int
    silhouette: float

    @classmethod
    def fit(cls, features: Tensor, references: Tensor, seed: int = 0) -> "CopyCluster | None":
        """Split samples `(N, D)` into two clusters; return None if they cannot be split, or if the memorised images
        `(R, D)` are not all in one cluster."""
        labels, silhouette = split_clusters(features, 2, seed)
        if silhouette is None:
            return None
        memorized = {memorized_cluster(features, labels, reference) for reference in references}
        if len(memorized) > 1:
            return None
        centers = torch.stack([features[labels == label].mean(0) for label in range(2)])
        return cls(centers, memorized.pop(), silhouette)

    def flags(self, features: Tensor) -> Tensor:
        """Return which features `(N, D)` are those of copies, `(N,)` bool."""
        # The ball about the memorised centre that touches the other cluster's half space lies in its own.
        radius = (self.centers[0] - self.centers[1]).norm() / 2
        return (features - self.centers[self.memorized]).norm(dim=1) < radius
