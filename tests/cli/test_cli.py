"""The commands: flags, exit codes, what a person sees when the server cannot start."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import trio
import trio.testing
from click.testing import CliRunner

from arka import cli, failpoints
from arka.errors import ConfigurationError, DataCorruption, Fenced, InternalError, Unavailable
from arka.settings import SETTINGS


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``arka-server`` in a temporary folder without any variable of ours."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ARKA_")]:
        monkeypatch.delenv(name)
    return lambda *arguments: CliRunner().invoke(cli.main_server, arguments)


def test_show_config_prints_every_setting(run):
    """``--show-config`` names every setting once, starts nothing and writes nothing."""
    result = run("--show-config")
    assert result.exit_code == 0
    shown = [line.split(" = ")[0] for line in result.output.splitlines()]
    assert shown == [key for key, setting in SETTINGS.items() if setting.kind is not dict]
    assert os.listdir() == []


@pytest.mark.parametrize(("variables", "code"), [({}, 2), ({"ARKA_TESTING": "0"}, 2), ({"ARKA_TESTING": "1"}, 0)])
def test_failpoints_are_for_tests_alone(run, monkeypatch, variables, code):
    """A stray ARKA_FAILPOINTS ends the start with the variable's name; a test says that it is one."""
    for name, value in ({"ARKA_FAILPOINTS": "wal.group_synced=kill"} | variables).items():
        monkeypatch.setenv(name, value)
    result = run("--show-config")
    failpoints.arm("", server_pid=0)
    assert result.exit_code == code
    assert ("ARKA_FAILPOINTS is set" in result.output) == bool(code)


@pytest.mark.parametrize(("parameter", "flag", "key"), [(p, f, k) for p, (f, k) in cli._FLAGS.items()])
def test_each_flag_gives_its_setting(run, parameter, flag, key):
    """A flag sets the key it is documented for, and is named as its origin."""
    values = {"server.port": "7", "server.http_port": "7", "log.format": "json", "log.level": "error"}
    urls = {"object_store.url": "s3://b", "iceberg.catalog_uri": "http://c", "iceberg.warehouse": "s3://w"}
    switches = ("demo_tables", "take_over", "adopt_warehouse", "new_store", "insecure")
    arguments = [flag] if parameter in switches else [flag, (values | urls).get(key, "given")]
    (line,) = [line for line in run(*arguments, "--show-config").output.splitlines() if line.startswith(f"{key} =")]
    assert line.endswith(f"# {flag}")
    assert "default" not in line


def test_flags_beat_variables_and_file(run, tmp_path, monkeypatch):
    """The command line has the last word."""
    (tmp_path / "arka.toml").write_text("[server]\nport = 1\nhttp_port = 2\n")
    monkeypatch.setenv("ARKA_SERVER_PORT", "11")
    output = run("--config", "arka.toml", "--port", "21", "--show-config").output
    assert "server.port = 21  # --port" in output
    assert "server.http_port = 2  # arka.toml" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], 'server.port = "70000" (from --port): must be at most 65535'),
        (["--config", "none.toml"], "Cannot read none.toml: No such file or directory"),
        (["--log-level", "loud"], "must be one of debug, info, warning, error"),
        (["--no-such-flag"], "No such option"),
    ],
)
def test_bad_settings_exit_with_2(run, arguments, message):
    """A setting that cannot work is said in a line, without a traceback, with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_version(run):
    """``--version`` names program and version."""
    assert run("--version").output.startswith("arka-server, version 0.")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("held by process 7"), 2),
        (DataCorruption("wal/1.seg", 64, "a", "b"), 3),
        (Fenced("epoch 3 is newer"), 4),
        (Unavailable("catalog away"), 1),
        (OSError(errno.EADDRINUSE, "Address already in use"), 1),
        (ExceptionGroup("n", [ExceptionGroup("m", [Fenced("epoch 3")])]), 4),
        (ExceptionGroup("n", [Fenced("epoch 3"), DataCorruption("f", 0, "a", "b")]), 3),
    ],
)
def test_startup_error_is_one_line_with_its_exit_code(capsys, error, code):
    """An error that a person can act on is one clear line; the code says which kind it was."""
    assert cli._report(error, ready=False, debug=False) == code
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "ready"),
    [(RuntimeError("bug"), False), (InternalError("bug"), False), (OSError(errno.EBADF, "bug"), True)],
)
def test_bug_keeps_its_traceback(capsys, error, ready):
    """What nobody expected is logged with its traceback, whatever the level, with exit code 1."""
    assert cli._report(error, ready=ready, debug=False) == 1
    captured = capsys.readouterr()
    assert "server.failed" in captured.out + captured.err


def test_debug_level_shows_the_traceback(capsys):
    """At ``log.level = debug`` an expected error shows where it came from too."""
    assert cli._report(Fenced("epoch 3"), ready=False, debug=True) == 4
    assert "arka.errors.Fenced: epoch 3" in capsys.readouterr().err


def test_interrupt_before_the_handlers_is_a_signal_exit():
    """Ctrl-C during the imports ends quietly with 130."""
    assert cli._report(KeyboardInterrupt(), ready=False, debug=False) == 130


async def test_first_signal_drains_and_second_kills(monkeypatch):
    """SIGTERM asks for a drain; another signal during it ends the process at once with 128 + n."""
    killed: list[int] = []
    monkeypatch.setattr(cli.os, "_exit", killed.append)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(cli._watch_signals, stop)
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        assert killed == []
        os.kill(os.getpid(), signal.SIGINT)
        while not killed:
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert killed == [130]
