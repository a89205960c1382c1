#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Show the queue at work, step by step, in a home directory that is thrown away.

    just demo             A hook fires, the link check finds a broken link, the next prompt is told,
                          and a task for Claude asks to write a file, is approved and is done. It
                          takes some seconds and no network: a shell script stands in for Claude.
    just demo --claude    The same with your Claude Code. It first names the account and the budget,
                          and asks.
    just demo-hub         A task goes to another machine, and its result comes back. uv downloads a
                          PostgreSQL (75 MB). If TASK_QUEUE_HUB is set, that database is the hub.

Each line that begins with $ is a command that runs as shown; its output follows.

exit codes: 0 every step happened; 1 one did not, or you said no; 64 usage.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from taskqueue import cli, environment, installation

HERE = Path(__file__).resolve().parent
# How long a step may take: on a busy machine; with Claude, or with downloads.
STEP_SECONDS, LONG_SECONDS = 60, 900
# How long a worker may take to end after each of two SIGTERMs.
END_SECONDS = 5
BUDGET_USD = 0.5

HOOK = "~/.claude/automation/lychee/runtime/hook"
ADD = f"""tq add approvals claude --task-id mend '{{"prompt": "Write pier.md.", "workspace_path": "'"$PWD"'", "max_budget_usd": {BUDGET_USD}}}'"""
FILES = {
    "notes/README.md": "# Harbour\n\nThe [tides](tides.md) are right.\nThe [pier](pier.md) is new.\n",
    "notes/tides.md": "# High water at noon\n",
    "stop.json": '{"session_id": "1", "cwd": "%s", "hook_event_name": "Stop"}\n',
    "prompt.json": '{"session_id": "1", "cwd": "%s", "hook_event_name": "UserPromptSubmit"}\n',
}
# Stands in for Claude Code: it does the work if it may, and prints lines like those of `claude -p`.
CLAUDE = """#!/bin/sh
cat >/dev/null
echo '{"type": "system", "subtype": "init", "session_id": "1", "model": "a shell script", "cwd": "~/notes"}'
echo '{"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Write", "input": {"file_path": "pier.md"}}]}}'
case "$*" in
    *pier.md*) echo '# The pier is 80 m long' >pier.md; says="I wrote pier.md." denied= ;;
    *) says="I may not write." denied='{"tool_name": "Write", "tool_input": {"file_path": "pier.md"}}' ;;
esac
echo '{"type": "result", "is_error": false, "result": "'"$says"'", "session_id": "1", "num_turns": 2, "total_cost_usd": 0, "permission_denials": ['"$denied"']}'
"""
REAL_CLAUDE = """#!/bin/sh
HOME={home} exec {claude} "$@"
"""
# Stands in for handlers/link_validation.
LINK_CHECK = """#!/bin/sh
grep -no '](.*)' README.md | while IFS=: read -r line link; do
    file=${link#??} file=${file%?}
    [ -e "$file" ] || echo '{"summary": "1 broken link: README.md:'"$line → $file"'"}'
done
"""
GREET = """#!/bin/sh
echo '{"text": "greetings from the server"}'
"""


class Failed(Exception):
    """A step did not happen; the message says which, and why."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser("demo.py", __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--claude", action="store_true", help="run the real Claude Code: asks first")
    which.add_argument("--hub", action="store_true", help="have another machine run a task")
    args = parser.parse_args(argv)
    try:
        claude = ask_for_claude() if args.claude else None
        with cli.ending_by_signal(), ExitStack() as stack:
            made = tempfile.TemporaryDirectory(prefix="task-queue-demo-")
            directory = Path(stack.enter_context(made)).resolve()
            if args.hub:
                show_hub(directory, stack)
            else:
                show(Home(directory / "home", stack), claude)
    except (Failed, OSError, subprocess.SubprocessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    return 0


class Home:
    """A home directory with the commands as install makes them, and a worker."""

    def __init__(self, directory: Path, stack: ExitStack, name: str = "", uv: str = "") -> None:
        self.directory, self.stack, self.name = directory, stack, name
        self.notes, self.log = directory / "notes", directory / "worker.log"
        self.commands = directory / ".local/bin"
        # How much of the worker's log was read.
        self.read = 0
        prefix = directory / ".claude/automation/lychee"
        self.handlers, runtime = prefix / "handlers", prefix / "runtime"
        for folder in (self.notes, self.commands, self.handlers, runtime):
            folder.mkdir(parents=True)
        # With a record there, a checkout's worker takes the handlers from there.
        (prefix / "installed.json").write_text('{"files": {}}')
        paths = {"lib": HERE, "python": environment.own_python(), "uv": uv}
        paths |= {"state": prefix / "state", "home": directory}
        for template, program in (("tq.sh", self.commands / "tq"), ("hook.sh", runtime / "hook")):
            text = (HERE / "bin" / template).read_text()
            for key, path in paths.items():
                text = text.replace(f"\n{key}=\n", f"\n{key}={shlex.quote(str(path))}\n", 1)
            write_program(program, text)
        self.env = own_environment() | {"HOME": str(directory)}
        self.env["PATH"] = f"{self.commands}{os.pathsep}{self.env['PATH']}"

    def start(self, command: str, **output) -> subprocess.Popen:
        """Show a command, and start it in ~/notes in a process group of its own."""
        say(f"{self.name}$ {command}")
        process = subprocess.Popen(
            ["sh", "-c", f"exec {command.removesuffix(' &')}"],
            env=self.env,
            cwd=self.notes,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **output,
        )
        self.stack.callback(end, process)
        return process

    def run(self, command: str, **output) -> bytes:
        """Run a command to its good end; return its output if that is a pipe."""
        process = self.start(command, **output)
        printed, _ = process.communicate(timeout=LONG_SECONDS)
        if process.returncode != 0:
            raise Failed(f"exit {process.returncode} of: {command}")
        return printed

    def start_worker(self, command: str) -> None:
        with self.log.open("wb") as log:
            self.worker = self.start(f"{command} &", stdout=log, stderr=log)

    def wait_for(self, task_type: str, seconds: float, *states: str) -> str:
        """Wait until the worker's log says how a task of this type ended, and return that: one of
        the states, or completed."""
        deadline = time.monotonic() + seconds
        ended = re.compile(rf" {task_type} \S+ (?!started|scheduled)(\S+)")
        while not (found := ended.findall(log := self.log.read_text()[self.read :])):
            if self.worker.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"no {task_type} task has ended; the worker says:\n{log}")
            time.sleep(0.01)
        if found[0] not in ("completed", *states):
            raise Failed(f"the {task_type} task has not completed; the worker says:\n{log}")
        # The next end is one after this.
        self.read += len(log)
        return found[0]


# ------------------------------------------------------------------------- from a hook to Claude


def show(home: Home, claude: str | None) -> None:
    started = time.monotonic()
    for name, text in FILES.items():
        (home.directory / name).write_text(text.replace("%s", str(home.notes)))
    (home.handlers / "claude").symlink_to(handlers() / "claude")
    write_program(home.commands / "claude", CLAUDE)
    if claude:
        own = {"home": shlex.quote(str(Path.home())), "claude": shlex.quote(claude)}
        write_program(home.commands / "claude", REAL_CLAUDE.format(**own))
        home.env |= environment.decisive(os.environ)

    # uv does what it does for handlers, and downloads nothing.
    home.env |= {"UV_OFFLINE": "1", "UV_NO_CONFIG": "1", "UV_PYTHON": environment.own_python()}

    say("In a new home, ~/notes/README.md links to pier.md, which is missing. A worker waits.")
    home.start_worker("tq work notifications approvals")
    checker = put_link_check(home)

    say("\n1. Claude has answered. Its Stop hook writes one file, and ends.")
    fired = time.monotonic()
    home.run(f"{HOOK} notifications link_validation <~/stop.json")
    say(f"(no output, after {(time.monotonic() - fired) * 1000:.0f} ms)")
    home.wait_for("link_validation", STEP_SECONDS)

    say(f"\n2. The worker has checked the links, with {checker}. Your next prompt tells Claude:")
    tell(home, "the broken link")

    stand_in = "" if claude else " (here: a shell script)"
    say(f"\n3. Claude{stand_in} may read for a task, and asks you before it writes.")
    home.run(ADD)
    if home.wait_for("claude", LONG_SECONDS, "held") == "held":
        tell(home, "what Claude asks")
        say("\n4. You allow just that. The same session goes on.")
        home.run("tq approve mend")
        home.wait_for("claude", LONG_SECONDS)
    else:
        say("\n4. Your settings allow it, so Claude did not ask.")
    home.run("tq wait mend")
    if not (home.notes / "pier.md").is_file():
        raise Failed("Claude did not write pier.md")
    say(f"\nAll of this took {time.monotonic() - started:.1f} s.")


def tell(home: Home, news: str) -> None:
    """Have the hook of a prompt tell the news; show the line that the person sees."""
    told = home.run(f"{HOOK} --report <~/prompt.json", stdout=subprocess.PIPE)
    if b"pier.md" not in told:
        raise Failed(f"the next prompt was not told of {news}")
    say(json.loads(told)["systemMessage"])


def put_link_check(home: Home) -> str:
    """Put the link check in its place; return how it checks: with lychee, if that is downloaded."""
    real, place = handlers() / "link_validation", home.handlers / "link_validation"
    command = ["uv", "run", "--quiet", "--script", real, "--help"]
    if subprocess.run(command, env=home.env, capture_output=True).returncode == 0:
        place.symlink_to(real)
        return "lychee"
    write_program(place, LINK_CHECK)
    return "grep (lychee is not downloaded yet)"


def ask_for_claude() -> str:
    """Name the account and the budget, and return the path of Claude Code if the person agrees."""
    claude = shutil.which("claude")
    if claude is None:
        raise Failed("there is no claude on PATH: install Claude Code, or leave out --claude")
    status = subprocess.run([claude, "auth", "status", "--text"], capture_output=True, text=True)
    if status.returncode != 0:
        raise Failed(f"claude auth status says: {(status.stdout + status.stderr).strip()}")
    print(f"Claude Code ({claude}) will write one file in a directory that is thrown away.")
    print(f"It spends ${BUDGET_USD:.2f} at most, and keeps the session as always. The account:")
    print(status.stdout.strip())
    try:
        agreed = input("Go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        agreed = False
    if not agreed:
        raise Failed("you did not agree, and nothing was run")
    return claude


# ----------------------------------------------------------------------------- two machines, a hub


def show_hub(directory: Path, stack: ExitStack) -> None:
    url = os.environ.get("TASK_QUEUE_HUB") or start_postgres(stack)
    uv = installation.find_uv() or ""
    laptop, server = (Home(directory / name, stack, name, uv) for name in ("laptop", "server"))
    laptop.env["TASK_QUEUE_HUB"] = server.env["TASK_QUEUE_HUB"] = url
    write_program(server.handlers / "greet", GREET)

    say("1. The hub, a PostgreSQL, is prepared once.")
    laptop.run("tq relay init")

    say("\n2. The laptop has a task, and hands it over.")
    laptop.run("tq add builds greet --task-id hello")
    laptop.run("tq relay push builds --drain")

    say("\n3. The server fetches it into its own queue, where a worker runs it.")
    server.start_worker("tq work builds")
    server.run("tq relay fetch builds --drain")

    say("\n4. The laptop gets the result.")
    laptop.run("tq relay pull --drain")
    laptop.run("tq wait hello")


def start_postgres(stack: ExitStack) -> str:
    """Start a PostgreSQL that ends with the demonstration; return its URL."""
    script = HERE / "bench/postgres.py"
    if not script.is_file():
        raise Failed("--hub needs a whole checkout, or a PostgreSQL's URL in TASK_QUEUE_HUB")
    postgres = subprocess.Popen(
        ["uv", "run", "--quiet", "--script", script],
        env=own_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # It ends when its stdin is closed, and removes what it made.
    stack.callback(postgres.communicate)
    url = postgres.stdout.readline().strip()
    if not url:
        raise Failed("no PostgreSQL could be started; its message is above")
    return url


# -------------------------------------------------------------------------------------- for both


def say(text: str) -> None:
    print(text, flush=True)


def handlers() -> Path:
    """The handlers that came with this script: beside it, or where install puts them."""
    return next(filter(Path.is_dir, (HERE / "handlers", HERE.parent.parent / "handlers")))


def own_environment() -> dict[str, str]:
    """This process's environment, without what steers the queue, lychee or Claude Code."""
    uv = installation.find_uv()
    if uv is None:
        raise Failed("uv is missing: python3 -m pip install uv")
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
    steering = ("TASK_", "LYCHEE_", "CLAUDE", "ANTHROPIC_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    env["PATH"] = f"{os.path.dirname(uv)}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return env | {"UV_CACHE_DIR": cache.stdout.strip()}


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def end(process: subprocess.Popen) -> None:
    """End a process: the first SIGTERM lets a worker's handlers finish, the second does not."""
    for _ in range(2):
        process.terminate()
        try:
            process.wait(END_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pass
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
