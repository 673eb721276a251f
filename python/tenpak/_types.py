"""Types of arguments and results."""

import os
from collections.abc import Callable
from typing import Any

Path = str | os.PathLike[str]
#: Called with source bytes done, source bytes in all, and the name of the tensor; an exception stops the work.
Progress = Callable[[int, int, str], object]
Report = dict[str, Any]
