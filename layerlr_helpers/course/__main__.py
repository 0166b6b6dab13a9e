"""``python -m layerlr_helpers.course``: run all notebooks and write their pages."""

import sys

from layerlr_helpers.course.run_notebooks import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
