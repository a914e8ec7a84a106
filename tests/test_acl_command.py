"""`synthbroker acl` and `serve --grant`: users are made, and told how to come in."""

import shlex
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from servers import any_binary
from synthbroker import acl, cli, endpoint
from synthbroker.acl import Grant
from synthbroker.connection import Connection
from synthbroker.errors import ServerRefusedError
from users import Users, admin_of, balanced, make, read


def test_the_command_makes_a_user_whose_file_is_for_its_owner_only_and_tells_no_password(users, tmp_path, capfd):
    path = tmp_path / "g.json"
    words = ["acl", "generator", "--ring", "a", "--ring", "b", "--endpoint", str(path), "--url", users.admin]
    assert cli.main(words) == 0
    first = endpoint.read(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (first.user, first.unix_socket) == ("generator-a+b", str(users.server.socket_path))
    shown = "".join(capfd.readouterr())
    assert first.password not in shown
    assert "redis-cli ACL SETUSER generator-a+b reset" in shown
    make(users._replace(generator=path.as_uri()), ring="b")
    assert cli.main(words) == 0
    with pytest.raises(ServerRefusedError, match="password"):
        make(users._replace(generator=first.url()), ring="b")
    users.server.client().acl_deluser("generator-a+b")


def test_without_a_file_the_command_only_shows(users, capfd):
    before = users.server.client().acl_users()
    assert cli.main(["acl", "viewer", "--ring", "a", "--url", users.admin]) == 0
    assert ">PASSWORD" in capfd.readouterr().out
    assert users.server.client().acl_users() == before


def test_what_is_shown_makes_that_very_user(users, capfd):
    assert cli.main(["acl", "trainer", "--ring", "a", "--url", users.admin]) == 0
    _, *command = shlex.split(capfd.readouterr().out)
    users.server.client().execute_command(*command)
    shown = users.server.client().acl_getuser("trainer-a")
    acl_connection = Connection(users.admin)
    acl.grant(acl_connection, Grant("trainer", ("a",)), admin_of(users.server))
    acl_connection.close()
    made = users.server.client().acl_getuser("trainer-a")
    users.server.client().acl_deluser("trainer-a")
    assert {**shown, "passwords": 0} == {**made, "passwords": 0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["acl", "generator"], "--ring"),
        (["acl", "king", "--ring", "r"], "invalid choice"),
        (["acl", "viewer", "--ring", "a b"], "cannot name a ring"),
        (["serve", "--grant", "viewer:r"], "ROLE:RING=FILE"),
        (["serve", "--grant", "king:r=/f"], "one of generator, trainer, viewer"),
        (["serve", "--grant", "viewer:r,=/f"], "cannot name a ring"),
    ],
)
def test_wrong_usage_is_told(words, said, capfd):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert said in capfd.readouterr().err


def test_a_user_is_made_only_for_an_endpoint_file(users, tmp_path, capfd):
    words = [
        "acl",
        "viewer",
        "--ring",
        "a",
        "--endpoint",
        str(tmp_path / "v.json"),
        "--url",
        f"unix://{users.server.socket_path}",
    ]
    assert cli.main(words) == 1
    assert "of-the-admin" not in capfd.readouterr().err


def test_the_admin_s_own_file_is_not_written_over(users, capfd):
    path = admin_file(users)
    before = path.read_text()
    assert cli.main(["acl", "viewer", "--ring", "a", "--endpoint", str(path), "--url", users.admin]) == 1
    assert "give viewer-a another one" in capfd.readouterr().err
    assert path.read_text() == before


def admin_file(users):
    return Path(unquote(urlsplit(users.admin).path))


def test_serve_makes_users_at_its_start_and_takes_their_files_along(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))
    files = {role: tmp_path / f"{role}.json" for role in acl.ROLES}
    words = [word for role, path in files.items() for word in ("--grant", f"{role}:r={path}")]
    program = [sys.executable, "-m", "synthbroker", "serve", "--endpoint", tmp_path / "broker.json", *words]
    serving = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        shown = [serving.stdout.readline() for _ in range(5)]
        assert f"those of trainer-r in {files['trainer']}\n" in shown
        here = Users(None, "", *[path.as_uri() for path in files.values()])
        make(here, count=4, producers=1)
        assert sorted(read(here)) == [0, 1, 2, 3]
        assert balanced(here) == (True, ())
    finally:
        serving.terminate()
        serving.communicate(timeout=20)
    assert [*tmp_path.iterdir()] == []
