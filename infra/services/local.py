"""An S3-compatible store and an MLflow server on this machine, without docker: `python infra/services/local.py`.

For development and tests. It uses Ceph's object gateway if that is installed, else the smaller moto server, and
PostgreSQL, else SQLite. It prints which, and the settings that point crossray at them, and runs until SIGTERM or
Ctrl-C. Everything listens on loopback. All data is deleted at the end, so keep no results here.

Debian: `apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw postgresql`.
"""

import argparse
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

BUCKET = "crossray"
_START_SECONDS = 120.0
_MEMORY_BYTES = 4_000_000_000
"""Largest size of Ceph's store, which is in memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the services, print their settings, wait for SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("services"), help="logs and databases")
    parser.add_argument("--store", choices=("auto", "ceph", "moto"), default="auto", help="which S3-compatible store")
    parser.add_argument("--settings", type=Path, help="also write the settings here, as JSON, when all is ready")
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    folder: Path = parsed.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    with ExitStack() as stack:
        settings = stack.enter_context(object_store(folder / "store", parsed.store))
        settings |= stack.enter_context(mlflow_server(folder / "mlflow", settings))
        for name, value in settings.items():
            print(f"export {name}={value}")
        print(f"# store: {settings['CROSSRAY_STORE']}; database: {settings['CROSSRAY_DATABASE']}; Ctrl-C ends both")
        sys.stdout.flush()
        if parsed.settings:
            temporary = parsed.settings.with_suffix(".tmp")
            temporary.write_text(json.dumps(settings))
            temporary.replace(parsed.settings)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


@contextmanager
def object_store(folder: Path, kind: str = "auto") -> Iterator[dict[str, str]]:
    """A running store with an empty bucket; yields AWS_* variables and CROSSRAY_STORE, the kind of the store."""
    has_ceph = all(shutil.which(name) for name in ("ceph-mon", "ceph-osd", "radosgw", "ceph", "monmaptool"))
    if kind == "ceph" and not has_ceph:
        raise SystemExit("expected Ceph's programs (ceph-mon, ceph-osd, ceph-common, radosgw), not all are installed")
    kind = kind if kind != "auto" else "ceph" if has_ceph else "moto"
    folder.mkdir(parents=True, exist_ok=True)
    key, secret = f"crossray{secrets.token_hex(6)}", secrets.token_hex(16)
    with (_ceph if kind == "ceph" else _moto)(folder, key, secret) as url:
        settings = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
        _make_bucket(settings)
        yield settings | {"CROSSRAY_STORE": kind}


@contextmanager
def mlflow_server(folder: Path, store: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A running MLflow server that keeps artifacts in the bucket; yields its address and CROSSRAY_DATABASE."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with ExitStack() as stack:
        programs = _postgres_programs()
        if programs is not None:
            uri, kind = stack.enter_context(_postgres(folder / "database.log", programs)), "postgresql"
        else:
            uri, kind = f"sqlite:///{folder / 'mlflow.db'}", "sqlite"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
        ]
        # The database's address holds a password, so it goes through the environment.
        environment = {**os.environ, **store, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        url = f"http://127.0.0.1:{port}"
        stack.enter_context(_process(command, folder / "server.log", environment))
        _wait_for(lambda: _answers(f"{url}/health"), "MLflow", folder / "server.log")
        yield {"MLFLOW_TRACKING_URI": url, "CROSSRAY_DATABASE": kind}


def free_port() -> int:
    """A free port of loopback."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def _moto(folder: Path, _key: str, _secret: str) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command, folder / "moto.log"):
        _wait_for(lambda: _answers(f"{url}/moto-api/"), "moto", folder / "moto.log")
        yield url


@contextmanager
def _ceph(folder: Path, key: str, secret: str) -> Iterator[str]:
    """One monitor, one object daemon in memory and one gateway, without authentication between them."""
    cluster, port = str(uuid.uuid4()), free_port()
    monitor = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
    config = folder / "ceph.conf"
    config.write_text(_ceph_config(folder, cluster, monitor, port))
    here = ["-c", str(config)]
    for name in ("mon", "osd"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    with ExitStack() as stack:
        monmap = folder / "monmap"
        monmap.unlink(missing_ok=True)
        _run("monmaptool", "--create", "--addv", "a", monitor, "--fsid", cluster, str(monmap))
        _run("ceph-mon", *here, "--mkfs", "-i", "a", "--monmap", str(monmap))
        stack.enter_context(_process(["ceph-mon", *here, "-i", "a", "-f"], folder / "mon.log"))
        daemon = str(uuid.uuid4())
        _run("ceph", *here, "osd", "create", daemon)
        _run("ceph-osd", *here, "--mkfs", "-i", "0", "--osd-uuid", daemon)
        stack.enter_context(_process(["ceph-osd", *here, "-i", "0", "-f"], folder / "osd.log"))
        user = ["user", "create", "--uid=crossray", "--display-name=crossray"]
        _run("radosgw-admin", *here, *user, f"--access-key={key}", f"--secret-key={secret}")
        gateway = ["radosgw", *here, "-n", "client.admin", "-f"]
        stack.enter_context(_process(gateway, folder / "gateway.log"))
        url = f"http://127.0.0.1:{port}"
        _wait_for(lambda: _answers(url), "radosgw", folder / "gateway.log")
        yield url


def _ceph_config(folder: Path, cluster: str, monitor: str, port: int) -> str:
    """Settings of Ceph. ms mon client mode is crc, because encryption would need authentication."""
    return f"""[global]
fsid = {cluster}
mon host = {monitor}
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
ms mon client mode = crc
mon data = {folder}/mon
mon allow pool size one = true
mon warn on pool no redundancy = false
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {_MEMORY_BYTES}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
"""


def _postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs, which Debian does not put on the PATH; None without them or a driver."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions and _has_driver() else None


def _has_driver() -> bool:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _postgres(log: Path, programs: Path) -> Iterator[str]:
    """A temporary PostgreSQL server on loopback; yields its URI.

    PostgreSQL refuses to run as root, so under root it runs as the user postgres, in a folder that this user can read.
    """
    port, password = free_port(), secrets.token_hex(16)
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="crossray-database-") as temporary:
        here = Path(temporary)
        (here / "password").write_text(password)
        for path in (here, here / "password"):
            shutil.chown(path, user)
        data = str(here / "data")
        options = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={here / 'password'}", "--encoding=UTF8"]
        _run(*as_user, str(programs / "initdb"), *options, "-D", data)
        command = [
            *as_user,
            str(programs / "postgres"),
            "-D",
            data,
            "-p",
            str(port),
            "-h",
            "127.0.0.1",
            "-k",
            temporary,
        ]
        with _process(command, log):
            _wait_for(lambda: _listens(port), "PostgreSQL", log)
            yield f"postgresql://mlflow:{password}@127.0.0.1:{port}/postgres"


@contextmanager
def _process(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Runs a server during the block and writes its output to a file."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


def _wait_for(is_ready: object, name: str, log: Path) -> None:
    assert callable(is_ready)
    deadline = time.monotonic() + _START_SECONDS
    while not is_ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} did not start within {_START_SECONDS:.0f} s: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _make_bucket(settings: Mapping[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=settings["AWS_ENDPOINT_URL"],
        aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)


if __name__ == "__main__":
    sys.exit(main())
