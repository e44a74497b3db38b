"""Kernels from Debian's archive, through apt and beside the system's own apt.

apt reads a configuration of ours alone: own lists, own package files, no dpkg status, only
the suites that are asked for. The archive's address, and how to reach it, are the system's. apt
verifies every list with Debian's archive keyring, and every package with the lists.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.vm.kernels import Kernel, KernelsError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# How the system reaches its mirror; what would loosen the verification is not taken over.
_REACH = re.compile(
    r"Acquire::(?:(?:https?::|Retries|ForceIPv)[^ ]*|Check-Valid-Until|Check-Date) ", re.IGNORECASE
)
_DONE = ".complete"


class Fetched(NamedTuple):
    """A kernel that is at hand.

    Attributes:
        release: as ``uname -r`` will say.
        image: the compressed kernel.
        modules: its modules.
        headers: tree to build a module in, where the list wants one.
    """

    release: str
    image: Path
    modules: Path
    headers: Path | None


class Archive:
    """Debian's archive, for a few suites."""

    def __init__(self, cache: Path, suites: Sequence[str]) -> None:
        self._home = cache / "apt" / "-".join(suites)
        self._suites = suites
        self._environment = {**os.environ, "APT_CONFIG": str(self._home / "apt.conf")}

    def update(self) -> None:
        """Read the suites' lists.

        Raises:
            KernelsError: what apt said.
        """
        for name in ("state/lists/partial", "cache/archives/partial", "etc/preferences.d", "none"):
            (self._home / name).mkdir(parents=True, exist_ok=True)
        (self._home / "apt.conf").write_text(self._configuration())
        mirror = system_mirror()
        (self._home / "etc/sources.list").write_text(
            "".join(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n" for suite in self._suites)
        )
        self._run("apt-get", "--quiet=2", "--error-on=any", "update")

    def newest_image(self, name: str) -> str:
        """The release of the newest kernel whose version begins so.

        Args:
            name: the version, and perhaps a flavour: ``6.12``, ``6.12-rt``. Without one it is the
                generic one; the cloud's has no 9p.

        Raises:
            KernelsError: there is none.
        """
        version, _, flavour = name.partition("-")
        names = self._run("apt-cache", "pkgnames", f"linux-image-{version}").split()
        wanted = re.compile(
            rf"linux-image-({re.escape(version)}(?:\.[.\d]+)?(?:-\d+|\+deb\d+)?"
            rf"{f'-{flavour}' if flavour else ''}-amd64)"
        )
        found = [match[1] for name in names if (match := wanted.fullmatch(name))]
        if not found:
            raise KernelsError(f"no kernel {name} in {', '.join(self._suites)}")
        return max(found, key=lambda release: [int(n) for n in re.findall(r"\d+", release)])

    def existing(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that the archive has."""
        known = set(self._run("apt-cache", "pkgnames", "linux-").split())
        return [name for name in names if name in known]

    def dependencies(self, name: str, wanted: str) -> list[str]:
        """Names of what a package depends on, as far as they match."""
        shown = self._run("apt-cache", "depends", "--important", name)
        return re.findall(rf"^\s+Depends: ({wanted})$", shown, re.MULTILINE)

    def unpack(self, names: Sequence[str], root: Path) -> None:
        """Download packages and unpack their files below ``root``; nothing is installed."""
        packages = self._home / "packages"
        shutil.rmtree(packages, ignore_errors=True)
        packages.mkdir()
        self._run("apt-get", "--quiet=2", "download", *names, where=packages)
        for package in sorted(packages.glob("*.deb")):
            self._run("dpkg-deb", "--extract", str(package), str(root))
        shutil.rmtree(packages)

    def _configuration(self) -> str:
        reach = [line for line in _shown("apt-config", "dump") if _REACH.match(line)]
        return "\n".join(
            [
                f'Dir "{self._home}";',
                'Dir::State "state";',
                'Dir::State::status "/dev/null";',
                'Dir::Cache "cache";',
                'Dir::Etc "etc";',
                # No other sources, hooks and pins than ours.
                f'Dir::Etc::sourceparts "{self._home}/none";',
                f'Dir::Etc::parts "{self._home}/none";',
                'APT::Architecture "amd64";',
                'APT::Sandbox::User "root";',
                'Acquire::Languages "none";',
                *reach,
                "",
            ]
        )

    def _run(self, *command: str, where: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self._environment, cwd=where, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise KernelsError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout


def system_mirror() -> str:
    """The address of Debian's archive that this system uses.

    Raises:
        KernelsError: its sources name none.
    """
    for line in _shown("apt-get", "indextargets", "--format", "$(REPO_URI)"):
        if re.search(r"/debian/?$", line):
            return line
    raise KernelsError("the system's apt sources name no Debian archive (…/debian)")


def _shown(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def fetch(kernel: Kernel, cache: Path, *, refresh: bool = False) -> Fetched:
    """A kernel of the list, from the cache where it is there.

    Args:
        refresh: look for a newer package first.

    Raises:
        KernelsError: it could not be had.
    """
    root = cache / kernel.name
    if not refresh and (root / _DONE).exists():
        return _at(root, kernel)
    archive = Archive(cache, kernel.suites)
    archive.update()
    release = archive.newest_image(kernel.name)
    if (root / _DONE).exists() and (root / _DONE).read_text() == release:
        return _at(root, kernel)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    # Image and modules come in packages of their own since 7.
    parts = [f"linux-{part}-{release}" for part in ("image", "binary", "modules", "base")]
    archive.unpack(archive.existing(parts), root)
    if kernel.module:
        headers = f"linux-headers-{release}"
        wanted = r"linux-(?:headers-[\w.+-]+-common|kbuild-[\w.+-]+)"
        archive.unpack([headers, *archive.dependencies(headers, wanted)], root)
        _make_relocatable(root, release)
    if not (root / "lib").exists():
        # Where virtme-ng looks for the modules.
        (root / "lib").symlink_to("usr/lib")
    (root / _DONE).write_text(release)
    return _at(root, kernel)


def _make_relocatable(root: Path, release: str) -> None:
    """The headers' Makefile includes another one by its absolute path."""
    makefile = root / "usr/src" / f"linux-headers-{release}" / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{root}/usr/src/"))


def _at(root: Path, kernel: Kernel) -> Fetched:
    release = (root / _DONE).read_text()
    modules = root / "lib/modules" / release
    places = (root / "boot" / f"vmlinuz-{release}", modules / "vmlinuz")
    image = next((place for place in places if place.exists()), None)
    if image is None or not modules.is_dir():
        raise KernelsError(f"{root} holds no kernel {release}: remove it and try again")
    headers = root / "usr/src" / f"linux-headers-{release}"
    return Fetched(release, image, modules, headers if kernel.module else None)
