"""What a job cannot do is said where it was submitted: one clear line at the end, and exit code 2."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Nodes
from proxy import Faults, misbehaving
from runs import command, run_file

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.rare]


@pytest.fixture(scope="module")
def address(s3_root: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of a cluster of one node that has the credentials of the session's object store."""
    cluster = Nodes(tmp_path_factory.mktemp("cluster"), head_cpus=1)
    yield cluster.address
    cluster.close()


def submitted(folder: Path, address: str, root: str, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    path = run_file(folder, root, tracking={"kind": "none"})
    return command("submit", str(path), "--address", address, "--name", name, *more, cwd=folder)


def check(done: subprocess.CompletedProcess[str], name: str, *words: str) -> None:
    """One line with these words that names the job; nothing else on standard error."""
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"crossray: job {name}: "), line
    assert all(word in line for word in words), line
    assert done.stdout.splitlines()[-1] == f"job      {name} FAILED"


def test_a_job_without_a_usable_object_store_says_so_where_it_was_submitted(
    address: str, s3_root: str, tmp_path: Path
) -> None:
    missing = submitted(tmp_path, address, "s3://no-such-bucket-here/x", "missing")
    check(missing, "missing", "s3://no-such-bucket-here/x", "no such bucket; make it or correct storage.root")
    with misbehaving(os.environ["AWS_ENDPOINT_URL"], Faults(refuse=True)) as url:
        refused = submitted(tmp_path, address, s3_root, "refused", "--env", f"AWS_ENDPOINT_URL={url}")
    check(refused, "refused", "the object store refused the credentials", "check AWS_ACCESS_KEY_ID")

    listed = command("status", "--address", address, cwd=tmp_path).stdout.splitlines()
    assert [line for line in listed if line.startswith("missing  FAILED") and line.endswith("storage.root")]
    again = submitted(tmp_path, address, s3_root, "missing")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("crossray: --name: expected a new name, got 'missing', which is taken")
    assert again.stderr.count("\n") == 1
