import warnings

import pytest
import torch

from siss_diffusers.metrics.clusters import CopyCluster, memorized_cluster, split_clusters


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def two_groups() -> torch.Tensor:
    """Six copies, rather alike, around 0; ten other pictures around 8."""
    generator = torch.Generator().manual_seed(0)
    copies = 0.1 * torch.randn(6, 4, generator=generator)
    others = 8 + torch.randn(10, 4, generator=generator)
    return torch.cat([copies, others])


def test_groups_are_found_whatever_the_seed():
    features = two_groups()
    for seed in (0, 1):
        labels, silhouette = split_clusters(features, 2, seed)
        assert labels.shape == (16,) and labels.dtype == torch.long
        assert len(labels[:6].unique()) == len(labels[6:].unique()) == 1 and labels[0] != labels[6]
        assert silhouette > 0.8
    again, _ = split_clusters(features, 2, seed=1)
    assert torch.equal(again, labels)


def test_the_silhouette_is_its_definition():
    features = two_groups()
    labels, silhouette = split_clusters(features, 3, seed=0)
    values = []
    for index, label in enumerate(labels):
        distances = (features - features[index]).norm(dim=1)
        own = labels == label
        if own.sum() == 1:
            values.append(0.0)
            continue
        inner = (distances[own].sum() / (own.sum() - 1)).item()
        outer = min(distances[labels == other].mean().item() for other in labels.unique() if other != label)
        values.append((outer - inner) / max(outer, inner))
    assert silhouette == pytest.approx(sum(values) / len(values), abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_samples_are_one_cluster(count):
    labels, silhouette = split_clusters(torch.randn(count, 4), 3)
    assert labels.tolist() == [0] * count and silhouette is None


def test_equal_samples_are_one_cluster():
    labels, silhouette = split_clusters(torch.ones(9, 4), 3)
    assert labels.tolist() == [0] * 9 and silhouette is None
    assert memorized_cluster(torch.ones(9, 4), labels) == 0


def test_duplicates_are_not_split():
    """Fewer distinct features than clusters, which k-means warns of."""
    features = torch.tensor([[0.0, 1.0]] * 5 + [[3.0, 1.0]] * 4)
    labels, silhouette = split_clusters(features, 4)
    assert labels.tolist() in ([0] * 5 + [1] * 4, [1] * 5 + [0] * 4) and silhouette == pytest.approx(1)


@pytest.mark.parametrize("seed", range(6))
def test_near_duplicates_leave_no_label_out(seed):
    """Four each of three images, apart by less than the rounding of squared distances, for six clusters."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 4, generator=generator, dtype=torch.float64).repeat_interleave(4, dim=0)
    labels, _ = split_clusters(images + 1e-13 * torch.randn(12, 4, generator=generator, dtype=torch.float64), 6)
    groups = [set(group.tolist()) for group in labels.split(4)]
    assert sum(map(len, groups)) == len(set.union(*groups)) >= 3  # none in common
    assert set.union(*groups) == set(range(labels.max() + 1))


def test_the_memorised_cluster_is_the_tightest_of_two_or_more():
    features = torch.cat([two_groups(), torch.tensor([[20.0, -20.0, 0.0, 0.0]])])
    labels = torch.tensor([2] * 6 + [0] * 10 + [1])
    assert memorized_cluster(features, labels) == 2
    assert memorized_cluster(features[6:], labels[6:]) == 0  # not the single one
    assert memorized_cluster(features[16:], labels[16:]) == 1  # unless there is no other


def test_the_memorised_cluster_is_the_one_at_the_reference():
    features, labels = two_groups(), torch.tensor([1] * 6 + [0] * 10)
    assert memorized_cluster(features, labels, reference=torch.full((4,), 7.0)) == 0
    assert memorized_cluster(features, labels, reference=torch.zeros(4)) == 1


def test_the_copy_cluster_flags_what_is_nearest_to_its_centre():
    generator = torch.Generator().manual_seed(0)
    copies = torch.tensor([5.0, 0.0]) + 0.1 * torch.randn(30, 2, generator=generator)
    others = 0.5 * torch.randn(10, 2, generator=generator)
    cluster = CopyCluster.fit(torch.cat([copies, others]), torch.tensor([[5.0, 0.0], [5.1, 0.0]]))
    assert cluster.silhouette > 0.5
    assert cluster.flags(copies).all() and not cluster.flags(others).any()
    # Like neither: on the far side of the copies, where theirs is still the nearer centre.
    assert not cluster.flags(torch.tensor([[20.0, 0.0], [5.0, 9.0]])).any()
    # The other way round: the reference decides, not the size or the tightness.
    other = CopyCluster.fit(torch.cat([copies, others]), torch.zeros(1, 2))
    assert other.flags(others).all() and not other.flags(copies).any()
    # Memorised images on both sides: two clusters cannot tell copies from the rest.
    assert CopyCluster.fit(torch.cat([copies, others]), torch.tensor([[5.0, 0.0], [0.0, 0.0]])) is None


def test_there_is_no_copy_cluster_in_equal_samples():
    assert CopyCluster.fit(torch.ones(5, 2), torch.ones(1, 2)) is None
