"""Two hosts on one machine: namespaces with a name and an address each, and a cable between them.

Nothing outside of the namespaces changes, and they last as long as processes live in them.
"""

import os
import shutil
import subprocess
from pathlib import Path

from cluster import PATH, Host

ADDRESSES = {"alpha": "10.11.12.1", "beta": "10.11.12.2"}
PROGRAMS = ("ip", "nsenter", "unshare", "mount", "hostname")
BEGIN = 'hostname "$0" && ip link set lo up && echo && exec cat'
NAMED = 'mount --bind "$0" /etc/hosts && exec "$@"'


def why_not():
    """Say why there can be no hosts here; None if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs namespaces, and there is no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    tried = _run("unshare", "--net", "--uts", "--mount", "true", check=False)
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """The hosts alpha and beta, to be used in a `with` statement.

    Args:
        folder: where the file of their names is written.
    """

    def __init__(self, folder):
        self._names = Path(folder) / "hosts"
        lines = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
        self._names.write_text("".join(["127.0.0.1 localhost\n", *lines]))
        self._keepers = []
        self.hosts = []  # of cluster.Host

    def __enter__(self):
        for name, address in ADDRESSES.items():
            keeper = subprocess.Popen(  # ends with us, however we end: cat reads from our pipe
                ["unshare", "--net", "--uts", "sh", "-c", BEGIN, name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PATH": PATH},
            )
            keeper.stdout.readline()
            self._keepers.append(keeper)
            self.hosts.append(Host(name, address, (
                "nsenter", f"--target={keeper.pid}", "--net", "--uts",
                "unshare", "--mount", "sh", "-c", NAMED, str(self._names),
            )))
        alpha = self.hosts[0]
        _run(*alpha.enter, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable",
             "netns", str(self._keepers[1].pid))
        for host in self.hosts:
            _run(*host.enter, "ip", "address", "add", f"{host.address}/24", "dev", "cable")
            self.plug(host)
        return self

    def __exit__(self, *error):
        for keeper in self._keepers:
            keeper.communicate(timeout=30)

    def plug(self, host, state="up"):
        """Plug the cable of a host in, or pull it out: state "down"."""
        _run(*host.enter, "ip", "link", "set", "cable", state)

    def keep_trying(self, host, times):
        """Let a host give a connection up when it has sent something in vain so many times."""
        _run(*host.enter, "sh", "-c", f"echo {times} > /proc/sys/net/ipv4/tcp_retries2")


def _run(*words, check=True):
    return subprocess.run(words, capture_output=True, text=True, check=check,
                          env=os.environ | {"PATH": PATH})
