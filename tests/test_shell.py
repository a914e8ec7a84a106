"""The shell code of `synthbroker env`, run by a real shell."""

import shutil
import subprocess

import pytest

from synthbroker import shell
from synthbroker.errors import EndpointError

PASSWORD = "a'b\"c $(touch x) /@:#%"
QUOTED = "a%27b%22c%20%24%28touch%20x%29%20%2F%40%3A%23%25"


@pytest.fixture
def client_on_path(monkeypatch, tmp_path):
    """Put a redis-cli on the PATH that prints what it is called with, a line each."""
    program = tmp_path / "redis-cli"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "auth=$REDISCLI_AUTH" "url=$SYNTHBROKER_URL" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("REDISCLI_AUTH", "stale")


def after_eval(code, command):
    line = f'eval "$1"; {command}'
    run = subprocess.run(["bash", "-c", line, "-", code], capture_output=True, text=True, timeout=20, check=True)
    assert run.stderr == ""
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("redis://node7:6380", ["-h", "node7", "-p", "6380"]),
        ("redis://node7/0", ["-h", "node7", "-p", "6379"]),
        ("redis://node7:6380/3", ["-h", "node7", "-p", "6380", "-n", "3"]),
        ("redis://[::1]:6380/0", ["-h", "::1", "-p", "6380"]),
        ("rediss://node7:6380", ["-h", "node7", "-p", "6380", "--tls"]),
        ("rediss://node7?ssl_ca_certs=/a%20b.pem", ["-h", "node7", "-p", "6379", "--tls", "--cacert", "/a b.pem"]),
        ("unix:///run/a%20b.sock", ["-s", "/run/a b.sock"]),
        ("unix:///run/redis.sock?db=2", ["-s", "/run/redis.sock", "-n", "2"]),
        ("redis://me@node7", ["-h", "node7", "-p", "6379", "--user", "me"]),
    ],
)
def test_redis_cli_goes_where_the_url_says(client_on_path, url, arguments):
    shown = after_eval(shell.environment(url), "redis-cli GET 'a b'")
    assert shown == ["auth=", f"url={url}", *arguments, "GET", "a b"]


@pytest.mark.parametrize("user", ["", "default", "me"])
@pytest.mark.parametrize("address", ["redis://{}node7:1", "unix://{}/run/redis.sock"])
def test_the_password_travels_in_a_variable_whatever_it_holds(client_on_path, tmp_path, user, address):
    shown = after_eval(shell.environment(address.format(f"{user}:{QUOTED}@")), "redis-cli PING")
    assert shown[0] == f"auth={PASSWORD}"
    assert ("--user" in shown) == (user == "me")
    assert not any(PASSWORD in line for line in shown[2:])
    assert not (tmp_path / "x").exists()


def test_the_client_beside_the_server_is_taken_where_none_is_on_the_path(monkeypatch, tmp_path):
    folder = tmp_path / "some where"
    folder.mkdir()
    for name in ("redis-server", "redis-cli"):
        (folder / name).write_text("#!/bin/sh\necho beside: $*\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(folder / "redis-server"))
    monkeypatch.setattr(shutil, "which", lambda name: name if "/" in name else None)
    assert after_eval(shell.environment("redis://node7"), "redis-cli PING") == ["beside: -h node7 -p 6379 PING"]


def test_without_any_client_the_rest_is_still_there(monkeypatch):
    monkeypatch.setattr(shell, "find_client", lambda: None)
    code = shell.environment("redis://node7")
    assert "redis-tools" in code
    assert after_eval(code, 'echo "$SYNTHBROKER_URL"') == ["redis://node7"]


def test_no_server_known_is_an_error(monkeypatch, tmp_path):
    monkeypatch.delenv("SYNTHBROKER_URL", raising=False)
    monkeypatch.setenv("SYNTHBROKER_ENDPOINT", str(tmp_path / "none.json"))
    with pytest.raises(EndpointError, match="no server is known"):
        shell.environment(None)
