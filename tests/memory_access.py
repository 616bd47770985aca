"""Asking whether an address may be touched without ending the process where it may not."""

from __future__ import annotations

import ctypes
import errno
import os


def is_accessible(address: int) -> bool:
    """Let the kernel read a byte there: it answers EFAULT where a load would end us."""
    reader, writer = os.pipe()
    try:
        os.write(writer, (ctypes.c_char * 1).from_address(address))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(reader)
        os.close(writer)
    return True
