"""The npm packages that the emoji come from: versions and hashes, download, and the files inside.

A package is used only if its archive has the pinned hash, wherever it was got. Nothing is unpacked to disk.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError, one_line
from models.files import write_atomically

DEFAULT_REGISTRY = "https://registry.npmjs.org"
_TIMEOUT = 60
"""Seconds without a byte from the registry."""
_LARGEST = 64 << 20
"""Bytes of an archive; the largest of ours has 7 MB."""


@dataclass(frozen=True)
class Package:
    """A version of an npm package, and what its archive must hash to."""

    name: str
    version: str
    integrity: str
    """As npm's lock files have it: `sha512-` and the hash in base 64."""

    @property
    def file(self) -> str:
        """The archive's name as `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url_path(self) -> str:
        """The archive's place under a registry."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
"""Unicode CLDR names and keywords, and vendors' short codes. MIT."""
TWEMOJI = Package(
    "@iconify-json/twemoji",
    "1.2.5",
    "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
)
"""Twitter and contributors. CC BY 4.0."""
NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
"""Google. Apache 2.0."""
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
)
"""Microsoft. MIT."""


def registry() -> str:
    """The npm registry of the user: from `npm_config_registry`, else from their .npmrc, else the public one.

    Raises UserError if that is no URL."""
    settings = {name.lower(): value for name, value in os.environ.items()}
    found = settings.get("npm_config_registry")
    if not found:
        file = Path(settings.get("npm_config_userconfig") or Path.home() / ".npmrc")
        lines = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        named = re.findall(r"^\s*registry\s*=\s*[\"']?([^\"'\s]+)", lines, re.M)
        found = named[-1] if named else DEFAULT_REGISTRY
    if not re.match(r"https?://", found):
        raise UserError(f"npm's setting `registry` is {found!r}; expected a URL such as {DEFAULT_REGISTRY}")
    return found.rstrip("/")


def fetch(package: Package, folder: Path) -> Path:
    """The archive of `package` in `folder`, downloaded from the registry where it is not there yet.

    Raises UserError: no network, not in the registry, or another content than the pinned one."""
    archive = folder / package.file
    if archive.exists():
        return _verified(archive, package)
    url = f"{registry()}/{package.url_path}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            content = answer.read(_LARGEST)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"{url}: cannot be downloaded ({one_line(error)}); check the network and npm's setting `registry`, "
            f"or get it elsewhere (npm pack {package.name}@{package.version}) and pass its folder as --packages"
        ) from None
    _check(content, package, url)
    write_atomically(archive, content)
    return archive


def find(package: Package, folder: Path) -> Path:
    """The archive of `package` among those that the user has. Raises UserError: not there, or of other content."""
    archive = folder / package.file
    if not archive.is_file():
        raise UserError(
            f"{folder}: holds no {package.file}; get it with npm pack {package.name}@{package.version}, "
            "or leave out --packages to have it downloaded"
        )
    return _verified(archive, package)


def _verified(archive: Path, package: Package) -> Path:
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror}); delete it to get it anew") from None
    _check(content, package, archive)
    return archive


def _check(content: bytes, package: Package, where: str | Path) -> None:
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.integrity:
        raise UserError(
            f"{where}: {len(content):,} bytes that are not {package.name} {package.version} as pinned "
            f"({found[:20]}..., expected {package.integrity[:20]}...); delete or replace it"
        )


def read_documents(archive: Path, *names: str) -> Iterator[Any]:
    """JSON files of a package, in the order of `names`, such as `en/data.json`.

    Raises UserError naming the archive: damaged, or without one of them."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in names:
                content = tar.extractfile(f"package/{name}")
                if content is None:
                    raise KeyError(f"{name} is no file")
                yield json.load(content)
    except (KeyError, ValueError, EOFError, OSError, tarfile.TarError) as error:
        raise UserError(
            f"{archive}: not the expected npm package ({one_line(error)}); delete it to get it anew"
        ) from None
