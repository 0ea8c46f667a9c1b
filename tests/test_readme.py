import re
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def cloud(monkeypatch):
    """An S3 service on this machine that s3:// URLs go to, with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("my-bucket")
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_code_in_the_readme_runs(tmp_path, monkeypatch, cloud, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace := {})
    assert namespace["corner"].shape == (512, 512, 3)
    printed = capsys.readouterr().out
    assert "(64, 64, 3)" in printed
    found = re.search(r"^(\d+) of 12 chunks, by reading (\d+) bytes$", printed, re.M)
    assert found and 1 <= int(found[1]) < 12 and int(found[2]) < 4000
    assert len(re.findall(r"^\(\d, \d, 0\) \d+\.\d+$", printed, re.M)) == int(found[1])


def test_files_and_commands_named_in_the_readme_exist():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (root / target).is_file(), target
    for module in re.findall(r"python -m (benchmarks\.\w+)", README):
        assert (root / (module.replace(".", "/") + ".py")).is_file(), module
