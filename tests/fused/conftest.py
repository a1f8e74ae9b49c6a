import pytest

from tail_cases import BY_ENGINE
from timm_eca.fused import native


@pytest.fixture(params=BY_ENGINE)
def engine(request, monkeypatch):
    """Make the passes of one engine be taken; the other's are not called."""
    if request.param == "native" and not native.loaded():
        pytest.skip("the compiled passes are not built here")
    if request.param == "passes":
        monkeypatch.setattr("timm_eca.fused.tail.native.takes", lambda *_: False)
    return request.param
