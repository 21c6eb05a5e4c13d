"""A real Slurm cluster of two nodes on this machine, without systemd: munged, slurmctld and a slurmd a node.

Cut down from the script of a test cluster that was given to the project's developers.
"""

import getpass
import os
import random
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere: Lightning connects to the first one
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def missing() -> str | None:
    """Why there can be no cluster here."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if lacking:
        packages = "slurmctld slurmd slurm-client munge"
        return f"no {', '.join(lacking)} (apt-get install --no-install-recommends {packages})"
    return None if os.geteuid() == 0 else "the daemons of a Slurm cluster need root"


class Cluster:
    """The daemons, and what tests ask of them. All files are in one folder, which every user may enter, for munge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        # Neither another job's variables nor the test run's own.
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MASTER_", "PYTEST_"))
        }
        conf = folder / "slurm.conf"
        self.env = inherited | {"PATH": PATH, "SLURM_CONF": str(conf), "GLOO_SOCKET_IFNAME": "lo"}

    def start(self) -> None:
        """Until all nodes are idle."""
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        munge = self.folder / "munge"
        (munge / "munge.key").touch(mode=0o600)
        (munge / "munge.key").write_bytes(os.urandom(128))
        # Empty files beside slurm.conf keep the daemons away from /etc/slurm.
        for name, content in {"slurm.conf": self._conf(), "cgroup.conf": "", "gres.conf": ""}.items():
            (self.folder / name).write_text(content)
        kinds = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={munge}/munge.{ending}" for option, ending in kinds.items()]
        self._spawn("munged", "--foreground", "--num-threads=10", *files)
        self._until(lambda: (munge / "munge.sock").exists(), "munged has no socket")
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        self._until(lambda: len(self.run(*idle, check=False).split()) == len(NODES), "nodes do not become idle")

    def stop(self) -> None:
        """Jobs first, then the daemons, by their pids."""
        for job in set(self.run("squeue", "--noheader", "--all", "--format=%A", check=False).split()):
            self.run("scancel", "--signal=KILL", "--full", job, check=False)
            self.run("scancel", job, check=False)
        self._until(lambda: not self.run("squeue", "--noheader", "--all", check=False).strip(), "jobs do not end")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = True) -> str:
        """A client command's output; one that does not reach the cluster would try for long."""
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert not check or result.returncode == 0, (command, result.stderr)
        return result.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a script's text; the job's id."""
        path = self.folder / f"job-{len(list(self.folder.glob('job-*')))}.sh"
        path.write_text(script)
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, str(path)).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, timeout: float = 180) -> dict[str, str]:
        """Until it is over, requeued runs included."""
        self._until(lambda: self.job(job)["JobState"] in OVER, f"job {job} does not end", timeout)
        return self.job(job)

    def _until(self, holds, otherwise: str, timeout: float = 20) -> None:
        end = time.monotonic() + timeout
        while not holds():
            logs = "".join(f"\n{log.name}: {log.read_text()[-800:]}" for log in sorted(self.folder.glob("*.log")))
            assert time.monotonic() < end, otherwise + logs
            time.sleep(0.1)

    def _spawn(self, name: str, *options: str) -> None:
        with (self.folder / f"{name}-{len(self.daemons)}.log").open("wb") as log:
            command = [shutil.which(name, path=PATH), *options]
            daemon = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(daemon)

    def _conf(self) -> str:
        host, user, folder = socket.gethostname().split(".")[0], getpass.getuser(), self.folder
        with ExitStack() as stack:  # all open at once: distinct
            sockets = [stack.enter_context(socket.socket()) for _ in range(len(NODES) + 1)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            first, *ports = [each.getsockname()[1] for each in sockets]
        lines = [
            "ClusterName=onehost",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={first}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            # A requeued job waits for as long as credentials hold, 120 s by default; 5 s is the least.
            f"AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            "PlugStackConfig=/dev/null",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
            "SlurmdParameters=config_overrides",  # more CPUs than there are
            "KillWait=5",
            "MinJobAge=3600",  # keeps finished jobs in `scontrol show job`
            f"FirstJobId={random.randint(1, 9000)}",  # the training's port is 15000 and the last digits of the id
            "ReturnToService=2",
            "MessageTimeout=50",  # seconds: on busy cores the daemon's answer took more than the default, 10
            f"PartitionName=debug Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
        ]
        if socket.gethostbyname(host).startswith("127."):  # listen there; elsewhere on all interfaces
            lines.append("CommunicationParameters=NoCtldInAddrAny,NoInAddrAny")
        for node, port in zip(NODES, ports, strict=True):
            where = f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"{where} CPUs=4 RealMemory=65536 State=UNKNOWN")
        return "\n".join(lines) + "\n"
