"""The functions of `pyarrow.compute`, which it makes when it is imported.

No type checker sees them in its source, so they come through this one name, typed `Any`.
"""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
