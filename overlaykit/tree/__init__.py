"""What a layer says: columnar trees. No OCI documents, no network."""

from overlaykit.tree.changes import Change, changes
from overlaykit.tree.diff import against, diff
from overlaykit.tree.fingerprint import fingerprint
from overlaykit.tree.losses import Loss, Losses
from overlaykit.tree.merge import merge, squash
from overlaykit.tree.regular import regular
from overlaykit.tree.scan import scan
from overlaykit.tree.table import Entry, Flag, Kind, Strings, Tree, concat, from_entries
from overlaykit.tree.tarball import index_tar
from overlaykit.tree.tarwrite import write_tar
from overlaykit.tree.whiteout import WhiteoutFormat

__all__ = [
    "Change",
    "Entry",
    "Flag",
    "Kind",
    "Loss",
    "Losses",
    "Strings",
    "Tree",
    "WhiteoutFormat",
    "against",
    "changes",
    "concat",
    "diff",
    "fingerprint",
    "from_entries",
    "index_tar",
    "merge",
    "regular",
    "scan",
    "squash",
    "write_tar",
]
