import numpy as np
import pytest

from siss_diffusers.data.images import Images
from tests.helpers.image_rows import make_images


@pytest.fixture
def numbered(tmp_path) -> Images:
    """Twenty flat images whose grey level is their index, so that a tensor tells which image it is."""
    return make_images([np.full((8, 8), index, np.uint8) for index in range(20)], tmp_path / "numbered")
