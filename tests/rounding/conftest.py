"""The fixture of the tests of rounding: each stage that rounds parameters, in turn."""

import pytest
from rounded import LINKS


@pytest.fixture(params=LINKS)
def link(request):
    return LINKS[request.param]
