"""Tables that look the same everywhere."""

import pandas as pd


class Description(pd.DataFrame):
    """A data frame that is printed whole: pandas would leave out columns in a narrow terminal."""

    def __repr__(self) -> str:
        return self.to_string(formatters={name: "{:.3g}".format for name in ("lr", "weight_decay") if name in self})
