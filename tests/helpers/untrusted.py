"""Input that somebody else wrote is read as data, or refused in one sentence."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from siss_diffusers.errors import UsageError


BOUNDED = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')\nfrom diffusers import *\nfrom transformers import *\n"


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    (sentence,) = str(error.value).splitlines()
    return sentence
