"""``python -m layerlr_helpers.studies NAME``: run a recorded study, or go on with it."""

from layerlr_helpers.studies.command import main

if __name__ == "__main__":
    main()
