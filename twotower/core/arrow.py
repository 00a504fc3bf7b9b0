"""Arrow's compute functions under a name that type checkers accept, and its types of lists."""

from typing import Any

import pyarrow as pa
import pyarrow.compute

# PyArrow makes these functions when it is imported. No type checker sees them in its source, so
# they come through this one name.
pc: Any = pyarrow.compute


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a type is one of Arrow's three types of lists."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
