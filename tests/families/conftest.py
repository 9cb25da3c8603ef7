"""The tiny pipelines of all families, saved and loaded."""

import pytest

from siss_diffusers.families import NamedPipeline
from tests.helpers.tiny_families import TINY


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    return TINY[request.param]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The saved pipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.build().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(tiny, folder):
    """The family, and the pipeline, loaded as in training."""
    source = NamedPipeline(str(folder))
    family = tiny.family.from_source(source, tiny.resolution)
    pipeline = source.load_without_network(family)
    assert family.network(pipeline) is None
    source.load_network(family, pipeline)
    family.network(pipeline).eval()
    return family, pipeline
