"""The driver remote: files on another machine or in an object store, addressed as fsspec does it, mounted by rclone or
sshfs.

    url=sftp://user@host/path     also ssh://, s3://bucket/prefix, gs://, abfs://, http(s)://, webdav://, ftp://, smb://,
                                  file:///path; rclone://NAME/path for a remote of rclone's own configuration
    tool=rclone | sshfs           else rclone if it is installed, sshfs if not (for sftp)
    NAME=VALUE                    rclone's option of that backend, such as endpoint or key_file; sshfs's -o

Passwords have no place in a URL, which the store keeps: use keys, rclone's configuration, or its environment variables.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from overlaykit.errors import InvalidReference, Unsupported
from overlaykit.store.drivers import DATA, Mounting, Options, need_fuse, program, run

# fsspec's protocol -> rclone's backend, and what of the URL goes into its option `host` or `url`
BACKENDS = {
    "sftp": ("sftp", "host"), "ssh": ("sftp", "host"), "ftp": ("ftp", "host"), "smb": ("smb", "host"),
    "s3": ("s3", ""), "s3a": ("s3", ""), "gs": ("gcs", ""), "gcs": ("gcs", ""),
    "abfs": ("azureblob", ""), "az": ("azureblob", ""), "http": ("http", "url"), "https": ("http", "url"),
    "webdav": ("webdav", "url"), "file": ("local", ""), "local": ("local", ""), "memory": ("memory", ""),
    "rclone": ("", ""),
}  # fmt: skip
OWN = ("url", "tool")
SECRET = re.compile(r"pass|secret|token|key$|credential", re.IGNORECASE)
ENV_AUTH = ("s3", "gcs", "azureblob")  # whose keys rclone takes from the environment when told to


class Remote(Mounting):
    """Files elsewhere."""

    def create(self, directory: Path, options: Options) -> None:
        tool = _tool(options)
        where = remote(options) if tool == "rclone" else ssh_remote(options)
        assert where
        program(tool)

    def mount(self, directory: Path, options: Options) -> None:
        need_fuse()
        tool = _tool(options)
        argv = self._rclone(directory, options) if tool == "rclone" else self._sshfs(directory, options)
        code, said = run(argv)
        if code:
            said = re.sub(r"^[\d/]+ [\d:]+ (?:[A-Z]+ *: *)?", "", said)  # rclone's date and level
            raise OSError(errno.EIO, f"{tool}: {said or code}", options["url"])

    def _rclone(self, directory: Path, options: Options) -> list[str | Path]:
        everybody = ["--allow-other"] if os.geteuid() == 0 else []
        return [
            *(program("rclone"), "mount", remote(options), str(directory / DATA), "--daemon", *everybody),
            # Files are written here first, and sent when they are closed: whoever is killed leaves them to the next mount.
            *("--vfs-cache-mode", "full", "--vfs-write-back", "0", "--cache-dir", directory / "cache"),
            *("--dir-cache-time", "5s", "--attr-timeout", "1s"),
        ]

    def _sshfs(self, directory: Path, options: Options) -> list[str | Path]:
        more = [f"{name}={value}" if value else name for name, value in options.items() if name not in OWN]
        more += ["allow_other"] if os.geteuid() == 0 else []
        where, port = ssh_remote(options)
        ports = ["-p", str(port)] if port else []
        return [program("sshfs"), *ports, "-o", ",".join(["BatchMode=yes", *more]), where, directory / DATA]


def remote(options: Options) -> str:
    """What the options mean in rclone's own words: ":sftp,host='h':path". InvalidReference."""
    url = _url(options)
    backend, option = BACKENDS[url.scheme]
    path = unquote(url.path)
    if url.scheme == "rclone":
        return f"{url.hostname or ''}:{path.lstrip('/')}"
    given = {name: value for name, value in options.items() if name not in OWN}
    if backend in ENV_AUTH:
        given.setdefault("env_auth", "true")
        path = f"{url.netloc}{path}"
    elif option == "url":
        scheme = "https" if url.scheme == "webdav" else url.scheme
        given["url"], path = f"{scheme}://{url.netloc}{path}", ""
    elif option:
        given["host"] = url.hostname or ""
        named = {"user": unquote(url.username or ""), "port": str(url.port or "")}
        given |= {name: value for name, value in named.items() if value}
    else:
        path = f"{url.netloc}{path}"
    words = "".join(f",{name}={_quoted(value)}" for name, value in given.items())
    return f":{backend}{words}:{path}"


def ssh_remote(options: Options) -> tuple[str, int | None]:
    """What sshfs is told: USER@HOST:PATH, and the port if one was said. InvalidReference."""
    url = _url(options)
    if url.scheme not in ("sftp", "ssh"):
        raise Unsupported(f"{options['url']}: sshfs mounts sftp only", hint="apt install rclone")
    user = f"{unquote(url.username)}@" if url.username else ""
    return f"{user}{url.hostname}:{unquote(url.path)}", url.port


def _url(options: Options) -> SplitResult:
    text = options.get("url", "")
    try:
        url = urlsplit(text)
        _ = url.port  # a bad one is found only when it is asked for
    except ValueError as e:
        raise InvalidReference(f"url={text}: {e}") from None
    if url.scheme not in BACKENDS:
        raise InvalidReference(
            f"driver remote: url={text!r} is none that can be mounted",
            hint=f"there are {', '.join(BACKENDS)}, as in sftp://h/p",
        )
    if url.password is not None:
        raise InvalidReference(f"url={url.scheme}://...: a password in it would be kept in the store", hint="use a key")
    if url.scheme in ("sftp", "ssh", "ftp", "smb", "s3", "rclone") and not url.netloc:
        raise InvalidReference(f"url={text}: no host or bucket")
    for name in options:
        if name not in OWN and SECRET.search(name) and not name.endswith("_file"):
            raise InvalidReference(f"option {name} would be kept in the store", hint="use a file, or rclone's environment")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise InvalidReference(f"driver remote has no option {name!r}")
    return url


def _tool(options: Options) -> str:
    wanted = options.get("tool", "")
    if wanted not in ("", "rclone", "sshfs"):
        raise InvalidReference(f"tool={wanted}: driver remote mounts with rclone or sshfs")
    is_ssh = options.get("url", "").startswith(("sftp:", "ssh:"))
    return wanted or ("sshfs" if is_ssh and not shutil.which("rclone") and shutil.which("sshfs") else "rclone")


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
