"""What the files of a writable layer take on disk: bytes of their own, and bytes that they share with others by reflink."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

FS_IOC_FIEMAP = 0xC020660B  # linux/fs.h
HEAD, EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")  # linux/fiemap.h
FLUSH, LAST, SHARED = 1, 1, 0x2000
EXTENTS = 256  # asked for at once


def written(upper: Path) -> tuple[int, int]:
    """Bytes that the regular files below `upper` have for themselves, and bytes that they share."""
    own = shared = 0
    for directory, _, names in os.walk(upper):
        for name in names:
            place = os.path.join(directory, name)
            st = os.lstat(place)
            if stat.S_ISREG(st.st_mode):
                common = shared_bytes(place)
                own, shared = own + max(0, st.st_blocks * 512 - common), shared + common
    return own, shared


def shared_bytes(place: str) -> int:
    """Bytes of a file whose extents other files have too; 0 on a file system that does not tell."""
    count, at = 0, 0
    fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            answer = bytearray(HEAD.pack(at, (1 << 64) - 1 - at, FLUSH, 0, EXTENTS, 0) + bytes(EXTENT.size * EXTENTS))
            fcntl.ioctl(fd, FS_IOC_FIEMAP, answer)
            mapped = HEAD.unpack_from(answer)[3]
            for number in range(mapped):
                start, _, length, _, _, flags, *_ = EXTENT.unpack_from(answer, HEAD.size + number * EXTENT.size)
                count += length if flags & SHARED else 0
                at = start + length
                if flags & LAST:
                    return count
            if mapped == 0:
                return count
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            raise
        return 0
    finally:
        os.close(fd)
