"""python -m overlaykit.cli"""

import sys

from overlaykit.cli import main

sys.exit(main())
