"""The store's facts in SQLite: which snapshots, containers and volumes there are. Images and their names are not here:
they live in index.json, as every OCI layout has it.

ROOT/store.db, in WAL mode: any number of processes read while one writes, and what a killed writer began never happened.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from overlaykit.errors import IntegrityError, InUse, Unsupported
from overlaykit.store import reserve

WAIT = 60.0  # seconds for another process's transaction, each of which takes milliseconds

# Version n of the schema is what the first n scripts make. A script that was released never changes; a new one goes behind.
MIGRATIONS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE snapshots (
        id      TEXT PRIMARY KEY,                    -- its directory: ROOT/snapshots/ID
        key     TEXT NOT NULL UNIQUE,                -- committed: the name, a chain_id for a layer; else whose it is
        kind    TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
        parent  TEXT REFERENCES snapshots (id),      -- a committed one; NULL at the bottom
        created INTEGER NOT NULL                     -- nanoseconds since 1970
    );
    CREATE INDEX snapshots_parent ON snapshots (parent);
    CREATE TABLE containers (
        id         TEXT PRIMARY KEY,                 -- 64 hex digits; the key of its snapshot too
        name       TEXT NOT NULL UNIQUE,
        image      TEXT NOT NULL,                    -- digest of the image's manifest
        image_name TEXT NOT NULL,                    -- as it was called when the container was created
        created    INTEGER NOT NULL,
        config     TEXT NOT NULL                     -- RuntimeConfig as JSON
    );
    CREATE INDEX containers_image ON containers (image);
    """,
    """
    CREATE TABLE volumes (
        name    TEXT PRIMARY KEY,                    -- its directory: ROOT/volumes/NAME
        driver  TEXT NOT NULL,
        options TEXT NOT NULL,                       -- JSON, as labels
        labels  TEXT NOT NULL,
        created INTEGER NOT NULL
    );
    CREATE TABLE mounts (
        container   TEXT NOT NULL REFERENCES containers (id) ON DELETE CASCADE,
        destination TEXT NOT NULL,                   -- a clean absolute path in the container
        volume      TEXT REFERENCES volumes (name) ON UPDATE CASCADE,  -- NULL: a bind mount
        spec        TEXT NOT NULL,                   -- MountSpec as JSON
        PRIMARY KEY (container, destination)
    );
    CREATE INDEX mounts_volume ON mounts (volume);
    ALTER TABLE containers ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
    """,
    """
    CREATE TABLE container_snapshots (               -- names that a container gave to its frozen states
        container TEXT NOT NULL REFERENCES containers (id) ON DELETE CASCADE,
        name      TEXT NOT NULL,
        snapshot  TEXT NOT NULL REFERENCES snapshots (id),
        created   INTEGER NOT NULL,
        PRIMARY KEY (container, name)
    );
    CREATE INDEX container_snapshots_snapshot ON container_snapshots (snapshot);
    """,
    """
    CREATE TABLE layer_sizes (                       -- what a layer's files and links hold, however it is compressed
        diff_id TEXT PRIMARY KEY,
        size    INTEGER NOT NULL                     -- bytes
    );
    """,
)
VERSION = len(MIGRATIONS)


class Records:
    """The open store.db. Any number of threads may use one object."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """The records in `path`, brought to this version's schema. Unsupported if they are of a newer one."""
        self.path = os.fspath(path)
        self._root = os.path.dirname(self.path)
        self._lock = threading.RLock()
        self._depth = 0
        self._reserve = os.path.join(self._root, "reserve")
        try:
            self._open()
        except OSError as e:
            if e.errno != errno.ENOSPC or not os.path.exists(self._reserve):
                raise
            os.unlink(self._reserve)  # WAL mode needs room even to read
            self._open()

    def _open(self) -> None:
        with self._translated():
            self._db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        # A store that nobody closed lets go of the file all the same.
        self._finalizer = weakref.finalize(self, self._db.close)
        try:
            self._db.row_factory = sqlite3.Row
            self.execute("PRAGMA foreign_keys = ON")
            self.execute("PRAGMA synchronous = FULL")  # a commit that returned survives a power cut
            self._migrate()
        except BaseException:
            self._finalizer()
            raise

    def close(self) -> None:
        if self._finalizer.alive:
            self._finalizer()
            if not os.path.exists(self._reserve):
                self._fill_reserve()

    def _fill_reserve(self) -> None:
        try:
            with open(self._reserve, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, reserve.SIZE)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(self._reserve)  # no room yet: whoever closes the store next tries again

    def _migrate(self) -> None:
        if self._version() == VERSION:
            return
        from overlaykit.oci.durable import locked  # for the few who come first

        with locked(self._root):
            if self._version() == 0:
                self.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                found = self._version()
                if found > VERSION:
                    raise Unsupported(
                        f"{self.path} has schema version {found}, this overlaykit knows {VERSION}",
                        hint="use the overlaykit that wrote it, or a newer one",
                    )
                for script in MIGRATIONS[found:]:
                    for statement in script.split(";\n"):  # executescript would commit on its own
                        self.execute(statement)
                self.execute(f"PRAGMA user_version = {VERSION}")

    def _version(self) -> int:
        return int(self.rows("PRAGMA user_version")[0][0])

    # --- asking and changing ------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing: what is executed inside takes effect together, when the outermost block is left without error."""
        with self._lock:
            if not self._depth:
                self.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self.execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._db.in_transaction:
                    self.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def settle(self) -> None:
        """See to it that what could not be committed never will be.

        A commit whose fsync failed stays in the log, where nobody sees it, until the next one takes its place; but who
        opens the file after all others were killed would read it. To be called before what it refers to is removed.
        """
        sql = "INSERT OR REPLACE INTO meta VALUES ('settled', ?)"
        try:
            self.execute(sql, str(time.time_ns()))
        except OSError as e:
            if e.errno != errno.ENOSPC or not os.path.exists(self._reserve):
                raise
            os.unlink(self._reserve)
            self.execute(sql, str(time.time_ns()))

    def execute(self, sql: str, *values: object) -> int:
        """How many rows the statement changed."""
        with self._lock, self._translated():
            return self._db.execute(sql, values).rowcount

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """What a query finds."""
        with self._lock, self._translated():
            return self._db.execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row that a query finds."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as what a caller can do something about. A broken UNIQUE or REFERENCES stays as it is."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as e:
            code = getattr(e, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_BUSY:
                raise InUse(f"{self.path} was locked by another process for {WAIT:.0f} seconds") from e
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise IntegrityError(f"{self.path} is damaged: {e}") from e
            disk = os.statvfs(self._root)
            full = code == sqlite3.SQLITE_FULL or disk.f_bavail * disk.f_frsize < reserve.SIZE
            number = errno.ENOSPC if full else errno.EIO  # SQLite says "disk I/O error" for both
            raise OSError(number, os.strerror(number) if full else str(e), self.path) from e
