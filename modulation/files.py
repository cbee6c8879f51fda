"""Files that are read whole: only such as have an end.

Knows files. Knows nothing of what is in them; imports nothing heavy.
"""

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file; what could block for ever (a pipe) or never end (a device) is not read.

    Raises OSError.
    """
    # Opening a pipe without a writer would wait for one.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", str(path))
        return file.read()
