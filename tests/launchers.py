"""The launchers in a folder of their own, with stand-ins of the programs that they call."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = (
    "bash",
    "cat",
    "cksum",
    "cp",
    "dirname",
    "env",
    "git",
    "grep",
    "gzip",
    "mkdir",
    "mktemp",
    "rm",
    "seq",
    "sleep",
    "tar",
    "wc",
)

LAUNCHERS = [str(path.relative_to(ROOT)) for path in (ROOT / "experiments" / "launch").glob("*.*")]

# Flags that a shell, or a program that a shell starts, may change.
AWKWARD = ("--config.data.where=(('a b', '>=', 4),)", '--config.x=$HOME;`date` "q" \\ *')

# One call of printf is one write: records of programs that run beside one another stay whole.
RECORD = r"""#!/bin/bash
printf '%s\0' "$(basename "$0")" "$@" $'\1' >>"$CALLS"
"""
# Starts one process a node, each of which learns from the environment who it is.
SRUN = (
    RECORD
    + r"""
while [ "${1#--}" != "$1" ]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NTASKS=$SLURM_NNODES SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_STEP_NODELIST=localhost "$@" &
done
highest=0
for task in $(jobs -p); do
  wait "$task"
  status=$?
  [ $status -le $highest ] || highest=$status
done
exit $highest
"""
)


class Launcher:
    """A copy of the launchers in a folder with a space in its name, and a PATH of stand-ins."""

    def __init__(self, folder: Path):
        self.tree, self.bin, self.calls_file = folder / "my tree", folder / "bin", folder / "calls"
        self.bin.mkdir()
        for tool in (*TOOLS, "basename"):
            path = shutil.which(tool)
            assert path, f"{tool} is not on the PATH"
            os.symlink(path, self.bin / tool)
        for name in (
            ".ci/run",
            "launch_local.sh",
            "launch_tpu.sh",
            "setup.py",
            "experiments/configs/quickstart.py",
            *LAUNCHERS,
        ):
            target = self.tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)

    def stand_in(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(
        self, script: str, *args: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin), "HOME": str(self.tree), "CALLS": str(self.calls_file), **env}
        command = ["bash", str(self.tree / script), *args]
        return subprocess.run(
            command, cwd=cwd or self.tree, env=env, capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[list[str]]:
        """The recorded calls since the last time this was asked."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return [call.split("\0")[:-1] for call in text.split("\1\0") if call]


def submit_to_slurm(launcher, *args):
    """Submits to Slurm, and returns the flags of sbatch and the command of the job."""
    result = launcher.run("experiments/launch/slurm.sh", *args)
    assert result.returncode == 0, result.stderr
    ((_, *words),) = launcher.calls()
    script = words.index("experiments/launch/slurm_job.sh")
    return words[:script], words[script:]
