"""``python -m layerlr_helpers.experiments NAME``: run a recorded study."""

from layerlr_helpers.studies import main

main()
