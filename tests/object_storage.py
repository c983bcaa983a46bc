"""Object storage on this machine that speaks S3's or Google Cloud's protocol; a test is skipped where it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec.config
import pytest

BUCKET = "bucket"
NEEDED = {"s3": ("s3fs", "moto", "flask", "flask_cors"), "gs": ("gcsfs", "gcp_storage_emulator")}
"""Protocol -> packages that its tests take."""


@contextmanager
def object_storage(protocol: str) -> Iterator[str]:
    """URL of a bucket that is there while the context lasts, with the settings by which its file system finds it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Read when gcsfs is imported: asks for each bucket's kind over gRPC, which nobody answers here.
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        for package in NEEDED[protocol]:
            pytest.importorskip(package, reason=f"{protocol}:// is tested with {', '.join(NEEDED[protocol])}")
        with (_s3 if protocol == "s3" else _gs)(monkeypatch):
            yield f"{protocol}://{BUCKET}"


@contextmanager
def _s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
    yield
    server.stop()


@contextmanager
def _gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # as FSSPEC_GS_TOKEN=anon does at the start
    yield
    server.stop()
