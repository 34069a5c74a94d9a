import pytest
from hypothesis import HealthCheck, settings

from sparse_ft import ops

# The same examples on every run: a failure belongs to the change that brought it. `make test-slow` searches anew.
settings.register_profile(
    "sparse_ft", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("sparse_ft")


@pytest.fixture(params=ops.available_isas())
def isa(request):
    """Each instruction set that this processor has, in turn."""
    before = ops.active_isa()
    ops.activate_isa(request.param)
    yield request.param
    ops.activate_isa(before)
