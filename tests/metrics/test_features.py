import warnings

import pytest
import torch
import torch.nn.functional as F

from siss_diffusers.errors import UsageError
from siss_diffusers.metrics.features import copy_similarity, extract, load_torchscript, pixel_features, tell_apart


FLAG = "--sscd_weights"


class Flat(torch.nn.Module):
    """Shows what it was shown."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.dropout = torch.nn.Dropout()

    def forward(self, images):
        return self.dropout(self.scale * images.flatten(1))


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 4 * 4, 5)

    def forward(self, images):
        return self.linear(images.view(images.shape[0], -1))


def write(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return load_torchscript(write(Flat(), tmp_path_factory.mktemp("flat") / "flat.pt"), FLAG)


def test_features_of_different_pictures_differ():
    pictures = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    assert tell_apart(pictures) and tell_apart(torch.cat([pictures[:1].expand(9, -1), pictures[1:2]]))
    assert tell_apart(1e-20 * pictures) and tell_apart(pictures - 1e3)
    for dead in (0 * pictures, 0 * pictures + 1, pictures[:1].expand(5, -1) * (1 + 1e-8), pictures[:1]):
        assert not tell_apart(dead)


def test_a_network_is_loaded_frozen_and_quietly(tmp_path):
    path = write(Linear(), tmp_path / "linear.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_torchscript(path, FLAG)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    # A view needs contiguous images, which grey ones, expanded, are not.
    assert extract(model, torch.rand(3, 1, 4, 4), size=None, batch_size=2, flag=FLAG, normalize=False).shape == (3, 5)


def broken_files(tmp_path):
    (tmp_path / "text.pt").write_text("not a network")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(Linear().state_dict(), tmp_path / "state.pt")
    return {
        "missing.pt": "there is no file",
        ".": "there is no file",
        "text.pt": "not a TorchScript file",
        "empty.pt": "not a TorchScript file",
        "state.pt": "not a TorchScript file",
    }


def test_what_is_no_network_is_refused_in_one_sentence(tmp_path):
    for name, expected in broken_files(tmp_path).items():
        with pytest.raises(UsageError, match=expected) as raised:
            load_torchscript(tmp_path / name, FLAG)
        assert str(raised.value).startswith(f"{FLAG}: ") and "\n" not in str(raised.value)


def test_images_are_resized_and_normalised(flat):
    images = torch.rand(5, 3, 12, 12)
    found = extract(flat, images, size=4, batch_size=2, flag=FLAG)
    assert found.shape == (5, 3 * 4 * 4) and found.dtype == torch.float32
    resized = F.interpolate(images, (4, 4), mode="bilinear", antialias=True)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        expected = ((resized[:, channel] - mean) / std).flatten(1)
        torch.testing.assert_close(found.unflatten(1, (3, 16))[:, channel], expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_grey_becomes_three_equal_channels_and_the_batch_does_not_matter(flat, batch_size):
    images = torch.rand(5, 1, 4, 4)
    found = extract(flat, images, size=None, batch_size=batch_size, flag=FLAG, normalize=False)
    assert torch.equal(found, images.repeat(1, 3, 1, 1).flatten(1))


@pytest.mark.parametrize(
    "network, expected",
    [
        (lambda images: images, r"one row of features an image, not \(2, 3, 4, 4\)"),
        (lambda images: images.flatten(1)[:1], r"not \(1, 48\)"),
        (lambda images: (images.flatten(1),), "not tuple"),
        (lambda images: images.flatten(1) / 0, "not finite"),
    ],
)
def test_what_is_no_feature_is_refused(network, expected):
    module = torch.nn.Module()
    module.forward = network
    with pytest.raises(UsageError, match=f"^{FLAG}: .*{expected}"):
        extract(module, torch.rand(2, 3, 4, 4), size=None, batch_size=4, flag=FLAG)


def test_a_network_that_cannot_take_the_images_says_why_in_one_sentence(tmp_path):
    model = load_torchscript(write(Linear(), tmp_path / "linear.pt"), FLAG)
    with pytest.raises(UsageError, match=r"fails on images of \(3, 6, 6\): .*shapes") as raised:
        extract(model, torch.rand(2, 3, 6, 6), size=None, batch_size=4, flag=FLAG)
    assert "\n" not in str(raised.value)


def test_pixels_and_the_highest_cosine():
    images = torch.rand(4, 3, 5, 5)
    samples, references = pixel_features(images) - 0.5, pixel_features(torch.rand(2, 3, 5, 5)) - 0.5
    assert samples.shape == (4, 75)
    found = copy_similarity(samples, references)
    for index, sample in enumerate(samples):
        cosines = [(sample @ reference / sample.norm() / reference.norm()).item() for reference in references]
        assert found[index].item() == pytest.approx(max(cosines), abs=1e-6)
    torch.testing.assert_close(copy_similarity(3 * references, references), torch.ones(2))
