"""A whole solve compiled by Inductor. It is a file of its own because it takes as long as thirty other tests."""

from test_compile import check_values_and_gradients, compiles

from odeadv.solver import _loop


@compiles
def test_code_of_inductor_has_the_values_and_gradients_of_solve(monkeypatch):
    monkeypatch.setattr(_loop, "OPERATIONS", 100)
    check_values_and_gradients(options={"cpp_wrapper": True})  # an option, so that the state is not too small for it
