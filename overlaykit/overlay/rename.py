"""Renaming in a writable overlay: what moves, what it leaves behind, what it must not uncover.

A name that a lower still gives leaves a whiteout. A directory that comes to lie over a lower one is made opaque first. A
directory with lower parts cannot move (EXDEV), unless redirect_dir is on: then it remembers where they are. Follows
ovl_rename (fs/overlayfs/dir.c), and do_renameat2 (fs/namei.c) for the order of errors.
"""

from __future__ import annotations

import errno
import os
import stat
from os import rename as os_rename
from typing import TYPE_CHECKING

from overlaykit._ext import copyup
from overlaykit.overlay.copyup import EXCHANGE, NOREPLACE, WHITEOUT
from overlaykit.overlay.nodes import UPPER, Node
from overlaykit.overlay.resolve import AnyPath, Last, Place
from overlaykit.overlay.stack import fail, join
from overlaykit.tree.whiteout import REDIRECT

if TYPE_CHECKING:
    from overlaykit.overlay.writable import Overlay

REDIRECT_MAX = 256  # bytes of an absolute redirect; a longer one is EXDEV, as with the kernel's default redirect_max


def rename(overlay: Overlay, src: AnyPath, dst: AnyPath, flags: int) -> None:
    """Rename `src` to `dst`; flags: 0, NOREPLACE or EXCHANGE. Under the overlay's lock."""
    if flags & ~(NOREPLACE | EXCHANGE | WHITEOUT) or (flags & NOREPLACE and flags & EXCHANGE):
        raise fail(errno.EINVAL)
    if flags & WHITEOUT and flags & EXCHANGE:
        raise fail(errno.EINVAL)
    old = overlay._walk(src, parent=True, look=False)
    new = overlay._walk(dst, parent=True, look=False)
    if old.last is not Last.NAME:
        raise fail(errno.EBUSY)
    if new.last is not Last.NAME:
        raise fail(errno.EEXIST if flags & NOREPLACE else errno.EBUSY)
    old = old._replace(found=overlay._stack.find(old.node, old.name))
    if old.found is None:
        raise fail(errno.ENOENT)
    new = new._replace(found=overlay._stack.find(new.node, new.name))
    if flags & NOREPLACE and new.found is not None:
        raise fail(errno.EEXIST)
    if flags & EXCHANGE:
        if new.found is None:
            raise fail(errno.ENOENT)
        if not new.is_dir and new.slash:
            raise fail(errno.ENOTDIR)
    if not old.is_dir and (old.slash or (not flags & EXCHANGE and new.slash)):
        raise fail(errno.ENOTDIR)
    if old.is_dir and is_under(new.node, old):
        raise fail(errno.EINVAL)
    if new.is_dir and is_under(old.node, new):
        raise fail(errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
    if same_file(overlay, old, new):
        return
    overlay._may_remove(old)
    if new.found is not None:
        overlay._may_remove(new)
        if not flags & EXCHANGE:
            if old.is_dir and not new.is_dir:
                raise fail(errno.ENOTDIR)
            if new.is_dir and not old.is_dir:
                raise fail(errno.EISDIR)
    else:
        overlay._may_change(new.node)
    if flags & WHITEOUT:
        raise fail(errno.EINVAL)
    if flags & EXCHANGE:
        exchange(overlay, old, new)
    else:
        move(overlay, old, new)


def rename_own(overlay: Overlay, src: AnyPath, dst: AnyPath) -> bool:
    """The short way: in one directory, what upper alone has takes a name that no lower has. False if it is not that.

    Nothing has to be left behind, covered or marked: it is one system call, with the kernel's own errors.
    """
    if type(src) is not str or type(dst) is not str or overlay._resolver.known_by_links or overlay._stack.index is not None:
        return False
    head, _, old = src.rpartition("/")
    to, _, new = dst.rpartition("/")
    node = overlay._known.get(head)
    if to != head or node is None or node.foreign is not False or node.dead:
        return False
    names, children = node.names, node.children
    if names is None or old in names or new in names or new in children:
        return False
    kid = children.get(old)
    if kid is not None and (kid.lowers or kid.redirect):
        return False
    try:
        os_rename(old, new, src_dir_fd=node.upper_fd, dst_dir_fd=node.upper_fd)
    except OSError:  # the long way knows the right one
        return False
    if node.impure is not False:
        overlay._upper.origins.forget()  # of what had the name
    if kid is not None:
        del children[old]
        kid.name = new
        children[new] = kid
        overlay._resolver.forget_through(old, new)
    return True


def is_under(node: Node, place: Place) -> bool:
    """Whether directory `node` is the directory at `place`, or below it."""
    at: Node | None = node
    while at is not None and at.parent is not None:
        if at.parent is place.node and at.name == place.name:
            return True
        at = at.parent
    return False


def same_file(overlay: Overlay, old: Place, new: Place) -> bool:
    """Whether both are names of one file, so that renaming does nothing."""
    if old.found is None or new.found is None:
        return False
    if old.node is new.node and old.name == new.name:
        return True
    if old.is_dir:
        return False
    a, b = old.found.st, new.found.st
    if overlay._stack.index is not None:
        for place in (old, new):
            if place.node.upper_fd >= 0:
                overlay._upper.origins.is_impure(place.node)  # under the lock, which _shown would take
        a, b = overlay._shown(old), overlay._shown(new)
    elif old.found.layer != UPPER or new.found.layer != UPPER:
        return False  # hard links of a lower break apart as soon as one of them is touched
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def has_lower_parts(overlay: Overlay, place: Place) -> bool:
    """Whether the directory at `place` cannot move without a redirect."""
    return bool((place.found and place.found.layer != UPPER) or overlay._stack.child(place.node, place.name).lowers)


def move(overlay: Overlay, old: Place, new: Place) -> None:
    stack, upper = overlay._stack, overlay._upper
    merged = old.is_dir and has_lower_parts(overlay, old)
    if merged and not overlay.redirect_dir:
        raise fail(errno.EXDEV)
    covers = stack.find_lower(old.node, old.name) >= 0
    if new.is_dir and overlay._listing(stack.child(new.node, new.name)):
        raise fail(errno.ENOTEMPTY)
    overlay._lift(old, attributes=True)
    set_data_redirect(overlay, old, samedir=old.node is new.node)
    upper.copy_up_dir(new.node)
    entry = upper.counted(new.node, new.name, new.found)[1] if new.found is not None else ""
    if old.node is not new.node:
        upper.origins.moves(old.node.upper_fd, old.name, new.node)
    source, target = os.fsencode(old.name), os.fsencode(new.name)
    if merged:
        set_redirect(overlay, old, samedir=old.node is new.node)
    elif old.is_dir and new.node.lowers:
        upper.markers.set_opaque(old.node.upper_fd, old.name)
    in_upper = upper_has(new)
    if new.is_dir and in_upper:
        # What shows no names may still hold whiteouts, over which the file system would not rename.
        clear(overlay, new)
    if covers or (old.is_dir and in_upper and not new.is_dir):
        # A directory cannot be renamed over a whiteout: they change places, and a whiteout that covers nothing goes.
        if in_upper and not new.is_dir and (new.found is None):
            copyup.rename_at(old.node.upper_fd, source, new.node.upper_fd, target, EXCHANGE)
            if not covers:
                os.unlink(old.name, dir_fd=old.node.upper_fd)
        else:
            copyup.rename_at(old.node.upper_fd, source, new.node.upper_fd, target, WHITEOUT)
    else:
        copyup.rename_at(old.node.upper_fd, source, new.node.upper_fd, target)
    upper.lost_name(entry)
    kid = old.node.children.pop(old.name, None)
    gone = new.node.children.pop(new.name, None)
    if gone is not None:
        gone.die()
    if kid is not None:
        settle(kid, new)
    if old.is_dir:
        overlay._resolver.forget_through(old.name, new.name)
    else:
        overlay._resolver.forget_links()
    if merged:
        new.node.foreign = True
    elif old.node.foreign is None:
        old.node.foreign = overlay._has_foreign(old.node)


def exchange(overlay: Overlay, old: Place, new: Place) -> None:
    upper = overlay._upper
    moved = [(a, b) for a, b in ((old, new), (new, old)) if a.is_dir]
    merged = [has_lower_parts(overlay, a) for a, _ in moved]
    if any(merged) and not overlay.redirect_dir:
        raise fail(errno.EXDEV)
    for place in (old, new):
        overlay._lift(place, attributes=True)
        set_data_redirect(overlay, place, samedir=old.node is new.node)
    if old.node is not new.node:
        upper.origins.moves(old.node.upper_fd, old.name, new.node)
        upper.origins.moves(new.node.upper_fd, new.name, old.node)
    for (a, b), has_lowers in zip(moved, merged, strict=True):
        if has_lowers:
            set_redirect(overlay, a, samedir=a.node is b.node)
        elif b.node.lowers:
            upper.markers.set_opaque(a.node.upper_fd, a.name)
    copyup.rename_at(old.node.upper_fd, os.fsencode(old.name), new.node.upper_fd, os.fsencode(new.name), EXCHANGE)
    kids = old.node.children.pop(old.name, None), new.node.children.pop(new.name, None)
    for kid, place in zip(kids, (new, old), strict=True):
        if kid is not None:
            settle(kid, place)
    for (_, b), has_lowers in zip(moved, merged, strict=True):
        if has_lowers:
            b.node.foreign = True
    overlay._resolver.forget()


def settle(kid: Node, place: Place) -> None:
    """Directory `kid` is at `place` from now on."""
    kid.parent, kid.name = place.node, place.name
    place.node.children[place.name] = kid


def upper_has(place: Place) -> bool:
    """Whether upper has anything under the name, a whiteout included."""
    try:
        os.stat(place.name, dir_fd=place.node.upper_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def clear(overlay: Overlay, place: Place) -> None:
    """Make the directory of upper at `place`, which shows no names, really empty: an opaque copy takes its place."""
    upper, node = overlay._upper, place.node
    kid = overlay._stack.child(node, place.name)
    with os.scandir(f"/proc/self/fd/{kid.upper_fd}") as entries:
        if not any(entries):
            return
    temp = upper.temp()
    own, name = upper.markers.own, os.fsencode(temp)
    half = os.fsencode(upper.temp())
    copyup.copy_up(kid.upper_fd, b".", upper.work.fd, half, upper.work.fd, name, own, 0)
    try:
        upper.markers.set_opaque(upper.work.fd, temp)
        copyup.rename_at(upper.work.fd, name, node.upper_fd, os.fsencode(place.name), EXCHANGE)
    finally:
        upper.sweep(temp)
    node.children.pop(place.name, None)


def set_redirect(overlay: Overlay, place: Place, *, samedir: bool) -> None:
    """Have the merged directory at `place`, about to move, remember where its lower parts are. EXDEV if it cannot."""
    kid = overlay._stack.child(place.node, place.name)
    if kid.redirect and (samedir or kid.redirect[0] == "/"):
        return
    kid.redirect = write_redirect(overlay, place, kid.redirect, samedir=samedir)


def set_data_redirect(overlay: Overlay, place: Place, *, samedir: bool) -> None:
    """Have the file at `place`, about to get another name, remember where its data are if they are not in upper.

    Of hard links in a lower, any name may be the one that stays, so theirs is always the path from the root.
    """
    fd, markers = place.node.upper_fd, overlay._markers
    if not place.found or not stat.S_ISREG(place.found.st.st_mode):
        return
    if not markers.is_metacopy(os.stat(place.name, dir_fd=fd, follow_symlinks=False), fd, place.name):
        return
    samedir = samedir and place.found.layer >= 0 and place.found.st.st_nlink == 1
    redirect = markers.redirect(fd, place.name)
    if not redirect or not (samedir or redirect[0] == "/"):
        write_redirect(overlay, place, redirect or "", samedir=samedir)


def write_redirect(overlay: Overlay, place: Place, redirect: str, *, samedir: bool) -> str:
    """The redirect that now stands on `place`: its own name, or the path from the root by which the lowers know it."""
    value = redirect or place.name
    if not samedir:
        at: Node | None = place.node
        while value[0] != "/" and at is not None:
            value = join(at.redirect or at.name, value) if at.parent is not None else "/" + value
            at = at.parent
        if len(os.fsencode(value)) > REDIRECT_MAX:
            raise fail(errno.EXDEV)
    overlay._markers.set(place.node.upper_fd, place.name, REDIRECT, os.fsencode(value))
    return value
