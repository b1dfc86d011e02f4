"""Trees as text, one entry a line, in both directions, so that a failing test shows a diff of lines.

    / dir 755
    /etc/motd file 644 6 owner=1000:1000 mtime=1.5 xattr.user.colour=blue
    /etc/copy file 644 6 hardlink=/etc/motd
    /lib symlink 777 -> usr/lib
    /dev/null char 666 1:3
    /usr dir 755 opaque
    /gone whiteout

PATH KIND [MODE] [SIZE or MAJOR:MINOR], then what is not as usual (owner 0:0, mtime 0, no xattrs); a symlink's target
comes last. Mode may be left out when it is 755 of a directory, 644 of a file, 777 of a symlink. What does not print,
spaces and backslashes are bytes written \\xNN. `listing` gives a real directory in this form, with SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from overlaykit.tree import Entry, Flag, Kind, Tree, from_entries, regular

StrPath = str | os.PathLike[str]
MODES = {Kind.DIR: 0o755, Kind.SYMLINK: 0o777, Kind.WHITEOUT: 0}
PLAIN_MODE = 0o644
DEVICES = (Kind.CHAR, Kind.BLOCK)
KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIR,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
}


# --- printing ---------------------------------------------------------------------------------------------------------


def text(entries: Iterable[Entry]) -> str:
    """The lines of `entries` (a Tree is one such), without provenance (layer, offset) and without a final newline."""
    lines, first_name = [], {}
    for entry in entries:
        first = first_name.setdefault(entry.hardlink, entry.path) if entry.hardlink >= 0 else entry.path
        lines.append(line(entry, first))
    return "\n".join(lines)


def line(entry: Entry, first_name: str, *extra: str) -> str:
    """One entry; `first_name` is the path of the first name of its hard link, its own path if there is no other."""
    words = [escape("/" + entry.path), entry.kind.name.lower()]
    if entry.kind != Kind.WHITEOUT or entry.mode:
        words.append(f"{entry.mode:o}")
    if entry.kind == Kind.FILE:
        words.append(str(entry.size))
    elif entry.size:
        words.append(f"size={entry.size}")
    if entry.kind in DEVICES:
        words.append(f"{os.major(entry.rdev)}:{os.minor(entry.rdev)}")
    if (entry.uid, entry.gid) != (0, 0):
        words.append(f"owner={entry.uid}:{entry.gid}")
    if entry.mtime_ns:
        words.append(f"mtime={decimal(entry.mtime_ns)}")
    words += [f"xattr.{escape(name)}={escape(os.fsdecode(value))}" for name, value in sorted(entry.xattrs.items())]
    if first_name != entry.path:
        words.append(f"hardlink={escape('/' + first_name)}")
    words += [flag.name.lower() for flag in (Flag.OPAQUE, Flag.IMPLIED, Flag.LOWER_LINK) if flag in entry.flags]
    words += extra
    if entry.link is not None:
        words.append(f"-> {escape(entry.link)}")
    return " ".join(words)


def escape(string: str) -> str:
    r"""`string` with bytes that do not print, whitespace and backslashes as \xNN."""
    return "".join(char if prints(char) else _hex(os.fsencode(char)) for char in string)


def prints(char: str) -> bool:
    return char.isprintable() and not char.isspace() and char != "\\"


def _hex(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)


def decimal(mtime_ns: int) -> str:
    """Nanoseconds as seconds, with as many digits as it takes."""
    sign, (seconds, ns) = "-" * (mtime_ns < 0), divmod(abs(mtime_ns), 10**9)
    return f"{sign}{seconds}" + (f".{ns:09d}".rstrip("0") if ns else "")


# --- parsing ----------------------------------------------------------------------------------------------------------


def tree(source: str) -> Tree:
    """The Tree that the lines say; parents that have no line are implied."""
    return regular(from_entries(parse(source)))


def table(source: str) -> Tree:
    """The rows of the lines in their order, as nothing but rows."""
    return from_entries(parse(source))


def parse(source: str) -> list[Entry]:
    """The entries of the lines; blank lines and those that begin with # say nothing. ValueError for no entry."""
    entries: list[Entry] = []
    first_rows: dict[str, int] = {}
    for raw in source.splitlines():
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        entry, first = _parse_line(raw.strip())
        if first is not None:
            row = first_rows[first]
            group = entries[row].hardlink if entries[row].hardlink >= 0 else row
            entries[row] = replace(entries[row], hardlink=group)
            entry = replace(entry, hardlink=group)
        first_rows.setdefault(entry.path, len(entries))
        entries.append(entry)
    return entries


def _parse_line(raw: str) -> tuple[Entry, str | None]:
    words, arrow, target = raw.partition(" -> ")
    path, kind_name, *rest = words.split()
    kind = Kind[kind_name.upper()]
    values: dict[str, object] = {"mode": MODES.get(kind, PLAIN_MODE)}
    flags, xattrs, first = Flag.NONE, {}, None
    if arrow:
        values["link"] = unescape(target)
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals:
            if word.isdigit() and word is rest[0]:
                values["mode"] = int(word, 8)
            elif word.isdigit():
                values["size"] = int(word)
            elif re.fullmatch(r"\d+:\d+", word):
                values["rdev"] = os.makedev(*map(int, word.split(":")))
            elif word.upper() in Flag.__members__:
                flags |= Flag[word.upper()]
            else:
                raise ValueError(f"{raw}: what is {word!r}?")
        elif name == "owner":
            values["uid"], values["gid"] = map(int, value.split(":"))
        elif name == "mtime":
            values["mtime_ns"] = nanoseconds(value)
        elif name == "size":
            values["size"] = int(value)
        elif name == "hardlink":
            first = unescape(value).lstrip("/")
        elif name.startswith("xattr."):
            xattrs[unescape(name.removeprefix("xattr."))] = os.fsencode(unescape(value))
        else:
            raise ValueError(f"{raw}: what is {word!r}?")
    return Entry(unescape(path).lstrip("/"), kind, xattrs=xattrs, flags=flags, **values), first


def unescape(string: str) -> str:
    r"""`string` with every \xNN as the byte it is, as os.fsdecode has it."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), os.fsencode(string))
    return os.fsdecode(raw)


def nanoseconds(value: str) -> int:
    whole, _, part = value.partition(".")
    ns = abs(int(whole)) * 10**9 + int(part.ljust(9, "0") or 0)
    return -ns if value.startswith("-") else ns


# --- real directories -------------------------------------------------------------------------------------------------


def listing(
    directory: StrPath,
    *,
    fs: Any = os,
    without_xattrs: Collection[str] = (),
    seconds: bool = False,
    skip: Collection[str] = (),
) -> dict[str, str]:
    """Each path's line for everything in `directory`, with mode, owner, mtime, xattrs, hard links, devices and SHA-256.

    Nothing of overlaykit takes part: this is what its trees are compared with. fs: what has the functions of os, an
    Overlay for one, to see the tree as programs find it there. seconds: times cut to seconds. without_xattrs: prefixes
    of xattrs to leave out. skip: paths to leave out with all below, as "/proc".
    """
    lines: dict[str, str] = {}
    first_names: dict[tuple[int, int], str] = {}
    top = os.fspath(directory)
    for path, info in walk(fs, top, "", skip):
        full = os.path.join(top, path)
        kind = KINDS[stat.S_IFMT(info.st_mode)]
        entry = Entry(
            path,
            kind,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            size=info.st_size if kind == Kind.FILE else 0,
            mtime_ns=info.st_mtime_ns // 10**9 * 10**9 if seconds else info.st_mtime_ns,
            rdev=info.st_rdev if kind in DEVICES else 0,
            link=fs.readlink(full) if kind == Kind.SYMLINK else None,
            xattrs={
                name: fs.getxattr(full, name, follow_symlinks=False)
                for name in fs.listxattr(full, follow_symlinks=False)
                if not name.startswith(tuple(without_xattrs))
            },
        )
        first = path
        if kind != Kind.DIR and info.st_nlink > 1:
            first = first_names.setdefault((info.st_dev, info.st_ino), path)
        extra = [f"sha256={content_digest(fs, full)}"] if entry.size else []
        lines[f"/{path}"] = line(entry, first, *extra)
    return lines


def below_root(lines: dict[str, str]) -> dict[str, str]:
    """`lines` without the root itself.

    Its attributes are those of the highest layer that wrote them (image-spec), and umoci has it so. Docker unpacks through
    a temporary folder in the root, which changes its time; podman's roots have mode 555, whatever the layers say.
    """
    return {path: line for path, line in lines.items() if path != "/"}


def walk(fs: Any, top: str, path: str, skip: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    """(path, lstat) of a directory and all below, paths relative to `top`, names in order of their bytes."""
    full = os.path.join(top, path)
    info = fs.lstat(full)
    yield path, info
    if stat.S_ISDIR(info.st_mode):
        for name in sorted(fs.listdir(full), key=os.fsencode):
            inside = f"{path}/{name}" if path else name
            if f"/{inside}" not in skip:
                yield from walk(fs, top, inside, skip)


def content_digest(fs: Any, path: str) -> str:
    with (open if fs is os else fs.open)(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(expected: dict[str, str], found: dict[str, str], *, limit: int = 40) -> str:
    """What `found` has otherwise than `expected`, as at most `limit` lines with - and +; "" if equal."""
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        for sign, side in (("-", expected), ("+", found)):
            if path in side and expected.get(path) != found.get(path):
                lines.append(f"{sign} {side[path]}")
    if len(lines) > limit:
        lines[limit:] = [f"... and {len(lines) - limit} lines more"]
    return "\n".join(lines)
