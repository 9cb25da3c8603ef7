"""The tiny pipelines of all families, saved and loaded."""

import pytest

from siss_diffusers.families import NamedPipeline
from tests.helpers.tiny_families import BUILDERS


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda family: family.__name__)
def folder(request, tmp_path_factory):
    """The family, and the saved pipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    BUILDERS[request.param]().save_pretrained(folder)
    return request.param, folder


@pytest.fixture
def loaded(folder):
    """The family, and the pipeline, loaded as in training."""
    family_class, path = folder
    source = NamedPipeline(str(path))
    family = family_class.from_source(source)
    pipeline = source.load_without_network(family)
    assert family.network(pipeline) is None
    source.load_network(family, pipeline)
    family.network(pipeline).eval()
    return family, pipeline
