import copy
import pickle

from layerlr_helpers.history import DivergedError, History


def test_the_error_says_what_was_found_where_and_at_which_rates():
    error = DivergedError("the loss", float("nan"), {"stem": 1e-4, "head": 0.001})
    assert str(error).startswith("the loss is nan, with the rates stem 0.0001, head 0.001. Training has stopped")
    error.step, error.history = 7, History([{"step": 6}])
    assert "the loss is nan at step 7, with the rates" in str(error)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # as it comes out of another process
        assert str(twin) == str(error)
        assert twin.history.rows == [{"step": 6}]


def test_rates_that_an_optimizer_finds_itself_are_no_obstacle():
    assert "head nan" in str(DivergedError("the loss", float("inf"), {"head": float("nan")}))
