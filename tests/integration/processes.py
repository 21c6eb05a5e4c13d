"""Several command lines in a group of processes that is started once: imports cost more than a tiny training.

python -m tests.integration.processes FILE      FILE: a JSON list of lists of arguments
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT


def run_in_processes(commands: list[list[str]], num_processes: int = 2, timeout: float = 600) -> None:
    """Run each command line in `num_processes` processes together, on one thread each; fail with their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "commands.json"
        file.write_text(json.dumps([[str(part) for part in command] for command in commands]))
        world = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        processes = []
        for rank in range(num_processes):
            env = os.environ | world | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "TOKENFORMER_DEBUG": "1"}
            arguments = [sys.executable, "-m", "tests.integration.processes", str(file)]
            out = (Path(folder) / f"rank{rank}.log").open("w")
            processes.append((subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=out, stderr=out), out))
        try:
            deadline = time.monotonic() + timeout
            codes = [None]
            while None in codes and not any(codes) and time.monotonic() < deadline:
                time.sleep(0.1)
                codes = [process.poll() for process, _ in processes]
        finally:
            for process, out in processes:
                process.kill()
                out.close()
        if codes != [0] * num_processes:
            logs = "\n".join((Path(folder) / f"rank{rank}.log").read_text()[-14000:] for rank in range(num_processes))
            raise AssertionError(f"exit codes {codes}:\n{logs}")


def main() -> None:
    """Run the commands of the file, one after the other."""
    from lit_modules.cli import main as tokenformer

    for command in json.loads(Path(sys.argv[1]).read_text()):
        tokenformer(command)
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
