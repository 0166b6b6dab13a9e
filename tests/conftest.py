import matplotlib
import pytest
from hypothesis import settings

from layerlr_helpers import handwritten_digits, printed_glyphs

matplotlib.use("Agg")  # tests draw, but open no window

# No deadlines: the machine may be busy. Derandomised: a test that passes here passes in CI.
settings.register_profile("course", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("course")


@pytest.fixture(scope="session")
def small_glyphs():
    return printed_glyphs(256, image_size=32, seed=3)


@pytest.fixture(scope="session")
def small_digits():
    return handwritten_digits(image_size=32, seed=3)
