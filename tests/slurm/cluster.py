"""A real Slurm in a folder of its own: munged, slurmctld and a slurmd for each host.

Its one host is this machine, on loopback, or its hosts are namespaces of it (hosts.py).

A Slurm or munge that the machine may have is neither read nor touched: key, sockets, ports, state
and logs are this one's own, and it ends what it started by process id.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel",
            "squeue")
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "TIMEOUT"}
REQUEUE_EXIT = 7  # exit status of jobs that Slurm itself requeues, as some sites have it
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")  # stand for GPUs
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={lead.name}({lead.address})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credential of its last start has expired, by default for 120 s
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
RequeueExit={requeue_exit}
KillWait=30
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=256 RealMemory=256000 Gres=gpu:{gpus}\n"


def why_not():
    """Say why no Slurm can be started here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs Slurm, and there is no {', '.join(missing)} (slurm-wlm and munge of Debian)"
    return None if os.geteuid() == 0 else "needs root, to start Slurm"


@dataclass(frozen=True)
class Host:
    """A node of the Slurm: its name, its address, and how to run a command there."""

    name: str
    address: str
    enter: tuple = ()  # words before those of the command


def this_machine():
    """The host that the tests run on, as it sees itself."""
    return Host(socket.gethostname().partition(".")[0], "127.0.0.1")


class Cluster:
    """A Slurm to be started and stopped.

    Args:
        folder: an empty folder that every user may enter; all is written below it.
        hosts: list of Host; commands are run on the first.
    """

    def __init__(self, folder, hosts):
        self.folder = Path(folder)
        self._hosts = hosts
        self._daemons = []
        self._env = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "CUDA_"))
        } | {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in ("munge", "state", *(f"spool-{host.name}" for host in hosts)):
            (self.folder / name).mkdir(mode=0o755)
        self._configure()

    def _configure(self):
        general = SLURM_CONF.format(lead=self._hosts[0], folder=self.folder, ports=_free_ports(2),
                                    requeue_exit=REQUEUE_EXIT)
        nodes = "".join(NODE.format(name=host.name, address=host.address, gpus=len(DEVICES))
                        for host in self._hosts)
        (self.folder / "slurm.conf").write_text(general + nodes)
        gpus = "".join(f"Name=gpu File={file}\n" for file in DEVICES)
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        release = re.search(r"(\d+)\.(\d+)", self.command("slurmd", "-V")).groups()
        plugin = "disabled" if tuple(map(int, release)) >= (23, 11) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for path in (key, key.parent):
            shutil.chown(path, "munge", "munge")

    def start(self):
        """Start the daemons; return when all nodes take jobs."""
        munge = self.folder / "munge"
        self._start(
            "munged", "--foreground", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
            user="munge", group="munge", extra_groups=[],
        )
        self.until((munge / "socket").exists, 30, "munged's socket")
        self._start(*self._hosts[0].enter, "slurmctld", "-D", name="slurmctld")
        for host in self._hosts:
            self._start(*host.enter, "slurmd", "-D", name=f"slurmd-{host.name}")
        self.until(lambda: self._nodes().count("State=IDLE") == len(self._hosts), 60, "idle nodes")

    def _start(self, *words, name="munged", **user):
        with (self.folder / f"{name}.out").open("wb") as out:
            self._daemons.append(subprocess.Popen(
                words, env=self._env, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, **user,
            ))

    def _nodes(self):
        return self.command("scontrol", "show", "node", check=False)

    def stop(self):
        """Cancel what still runs and end the daemons."""
        try:
            self.command("scancel", "--user=root")
            self.until(lambda: not self.command("squeue", "-h"), 60, "the end of all jobs")
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                daemon.wait(30)

    def command(self, *words, check=True, env=None, **kwargs):
        """Run a command of Slurm; return its stdout."""
        done = subprocess.run(
            [*self._hosts[0].enter, *words], env=self._env | (env or {}), timeout=60,
            capture_output=True, text=True, check=False, **kwargs,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self, folder, script, *arguments, options=(), env=None):
        """Submit a batch script in a folder; return the number of the job."""
        env = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (
            env or {})
        return self.command("sbatch", "--parsable", *options, f"slurm/{script}.sbatch",
                            *map(str, arguments), cwd=folder, env=env).strip()

    def warn(self, number):
        """Signal a job as Slurm does before its time limit."""
        self.command("scancel", "--batch", "--signal=USR1", number)

    def requeue(self, number):
        """Requeue a job by Slurm itself, as after a preemption."""
        self.command("scontrol", "requeue", number)

    def cancel(self, number):
        """Cancel a job."""
        self.command("scancel", number)

    def log(self, number):
        """Return the text of a job's log, "" before there is one."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait_for_text(self, number, text, times=1):
        """Wait until a text stands so many times in the log of a job."""

        def found():
            ended = self.job(number)["JobState"] in ENDED
            if (enough := self.log(number).count(text) >= times) or not ended:
                return enough
            raise RuntimeError(f"job {number} ended without {text!r}: {self.log(number)}")

        self.until(found, 300, f"{text!r} in the log of job {number}")

    def job(self, number):
        """Describe a job or one task of an array ("7_1"): Slurm's fields, by their names."""
        text = self.command("scontrol", "show", "job", "--oneliner", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number, seconds=300):
        """Wait for the end of a job; return its fields."""

        def ended():
            job = self.job(number)
            return job if job["JobState"] in ENDED else None

        return self.until(ended, seconds, f"the end of job {number}")

    def until(self, happened, seconds, what):
        """Wait until a function returns something true, and return that."""
        end = time.monotonic() + seconds
        while not (value := happened()):
            dead = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"waited in vain for {what} (daemons that ended: {dead})")
            time.sleep(0.2)
        return value


def _free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
