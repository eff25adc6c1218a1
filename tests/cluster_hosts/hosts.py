"""Hosts on one machine: network, pid, mount, uts and ipc namespaces, each with an sshd of its own.

To `ray up` they are machines: an address, a home, a /tmp, processes that only they see.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

HOST = Path(__file__).parent / "host.sh"
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
SSH = [
    *["ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"],
    *["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5"],
]


def why_not() -> str | None:
    """What this machine lacks for hosts, in words, or None."""
    if os.geteuid() != 0:
        return "needs root (namespaces, mounts)"
    for program in ("ip", "unshare", "setpriv", "ssh", "ssh-keygen", "rsync"):
        if shutil.which(program) is None:
            return f"needs {program} (apt-get install iproute2 util-linux openssh-client rsync)"
    if not Path("/usr/sbin/sshd").exists():
        return "needs sshd (apt-get install openssh-server)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"namespaces: {tried.stderr.strip()}"


def sh(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=60)


def _sweep() -> None:
    """Remove the networks of test processes that were killed."""
    for name in re.findall(r"^\d+: (rs\d+(?:h\d+)?)[@:]", sh("ip", "link").stdout, re.M):
        if not Path(f"/proc/{re.findall(r'[0-9]+', name)[0]}").exists():
            sh("ip", "netns", "del", name, check=False)
            sh("ip", "link", "del", name, check=False)


class Hosts:
    """`count` hosts on a bridge; a context manager, which leaves nothing behind.

    Args:
        lab: an empty folder for their files; `lab/shared` is /mnt/ray_subnets on all of them.
    """

    def __init__(self, count: int, lab: Path) -> None:
        self.lab, self.key, self.shared = lab, lab / "id", lab / "shared"
        self._tag = f"rs{os.getpid()}"
        self._net = f"10.77.{os.getpid() % 250 + 1}"
        self.ips = [f"{self._net}.{i}" for i in range(1, count + 1)]
        self._names = [f"{self._tag}h{i}" for i in range(1, count + 1)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        _sweep()
        self.shared.mkdir(parents=True)
        for name in ("id", "hostkey"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.lab / name))
        sh("ip", "link", "add", self._tag, "type", "bridge")
        sh("ip", "addr", "add", f"{self._net}.254/24", "dev", self._tag)
        sh("ip", "link", "set", self._tag, "up")
        for name, ip in zip(self._names, self.ips, strict=True):
            sh("ip", "netns", "add", name)
            sh(*f"ip link add {name} type veth peer name eth0 netns {name}".split())
            sh(*f"ip link set {name} master {self._tag} up".split())
            inside = ["ip", "-n", name]
            sh(*inside, "addr", "add", f"{ip}/24", "dev", "eth0")
            sh(*inside, "link", "set", "eth0", "up")
            sh(*inside, "link", "set", "lo", "up")
            sh(*inside, "route", "add", "default", "via", f"{self._net}.254")
            self._boot(name)
        for ip in self.ips:
            self._wait(ip)

    def _boot(self, name: str) -> None:
        log = (self.lab / f"{name}.log").open("wb")
        places = [name, str(self.lab), sys.prefix, sys.base_prefix, str(Path.home())]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        self._processes.append(
            subprocess.Popen(
                # If this process is killed, the host dies too, and all in its pid namespace.
                [*DIES_WITH_US, "ip", "netns", "exec", name, *unshare, str(HOST), *places],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        log.close()

    def _wait(self, ip: str) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection((ip, 22), timeout=1).close()
                return
            time.sleep(0.2)
        logs = "\n".join(path.read_text() for path in self.lab.glob("*.log"))
        raise RuntimeError(f"{ip}: no sshd after 30 s\n{logs}")

    def ssh(self, ip: str, command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, in the shell that the launcher opens there."""
        return subprocess.run(
            [
                *[*SSH, "-i", str(self.key), f"root@{ip}"],
                f"bash --login -c -i {shlex.quote(f'source ~/.bashrc; {command}')}",
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # --kill-child takes the host's first process with it, that one the rest
            process.wait()
        for name in self._names:
            # A namespace lives as long as a process in it does.
            for pid in sh("ip", "netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            sh("ip", "netns", "del", name, check=False)
            sh("ip", "link", "del", name, check=False)  # goes by itself, but later
        sh("ip", "link", "del", self._tag, check=False)
