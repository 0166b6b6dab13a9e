"""The recorded comparisons: a fair contest of strategies, the studies made with it, and what their results say."""
