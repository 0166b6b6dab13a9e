"""``python -m layerlr_helpers.course``: run all notebooks and write their pages."""

import sys

from layerlr_helpers.course.run_notebooks import main

sys.exit(main())
