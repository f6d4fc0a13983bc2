"""How much memory a process may take: limits of its cgroups and of its job count as well as the machine's."""

from pathlib import Path

import psutil
import pytest

from memdec.artefacts import resources

GB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100 GB free and the cgroups that a test makes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GB}))
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path)
    monkeypatch.setattr(resources, "_OWN", tmp_path / "own")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def limit(folder: Path, most: str, used: int, cached: int, version: int = 2) -> None:
    names = {2: ("memory.max", "memory.current", "inactive_file")}
    names[1] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[version][0]).write_text(f"{most}\n")
    (folder / names[version][1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[version][2]} {cached}\n")


def test_without_limits_the_machine_counts(groups: Path) -> None:
    assert resources.free_memory() == 100 * GB  # no cgroups at all
    (groups / "own").write_text("0::/user.slice/job\n")
    limit(groups / "user.slice" / "job", "max", 3 * GB, 0)
    assert resources.free_memory() == 100 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_all_groups_counts(groups: Path, version: int) -> None:
    """The file cache of a group can be dropped, so it counts as free."""
    (groups / "own").write_text({2: "0::/slurm/job_7\n", 1: "4:cpu:/x\n9:memory:/slurm/job_7\n"}[version])
    top = groups / "memory" if version == 1 else groups
    limit(top / "slurm" / "job_7", str(8 * GB), 5 * GB, 2 * GB, version)
    assert resources.free_memory() == 5 * GB
    limit(top / "slurm", str(20 * GB), 18 * GB, GB, version)
    assert resources.free_memory() == 3 * GB


def test_in_a_container_its_own_group_is_the_top_one(groups: Path) -> None:
    (groups / "own").write_text("0::/kubepods/of/the/host\n")
    limit(groups, str(4 * GB), GB, 0)
    assert resources.free_memory() == 3 * GB


def test_the_memory_of_a_slurm_job_is_a_limit(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "6144")
    own = psutil.Process().memory_info().rss
    assert resources.free_memory() == pytest.approx(6 * GB - own, abs=GB / 10)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert resources.free_memory() == 0
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node
    assert resources.free_memory() == 100 * GB
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "3072")  # of a job with --mem-per-cpu
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert resources.free_memory() == pytest.approx(6 * GB - own, abs=GB / 10)
