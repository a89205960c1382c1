"""The environment of workers that hooks and the service start, and of handlers.

The lines of PREFIX/environment are NAME=value, taken as they stand. The worker reads the file itself, after `env -i`, and
adds what follows from the user id. Nothing else reaches such a worker, so no session and no workspace
chooses its programs or its account.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

STANDARD_PATH = ("/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")

# These choose a handler's account and its way to the network.
DECISIVE = re.compile(
    "(ANTHROPIC|AWS)_[A-Z0-9_]+|CLAUDE_CONFIG_DIR|CLAUDE_CODE_(OAUTH_TOKEN|USE_[A-Z0-9_]+)"
    "|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy|SSL_CERT_(FILE|DIR)|NODE_EXTRA_CA_CERTS"
)

# Settings of `claude` that its documentation names: sign-in, provider, limits, switches, how it runs
# commands. All other variables that begin with CLAUDE name a session, and a handler is part of none.
CLAUDE_SETTINGS = frozenset((
    "CLAUDE_CONFIG_DIR", "CLAUDE_AUTOCOMPACT_PCT_OVERRIDE", "CLAUDE_STREAM_IDLE_TIMEOUT_MS", "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_API_KEY_HELPER_TTL_MS", "CLAUDE_CODE_EFFORT_LEVEL", "CLAUDE_CODE_EXTRA_BODY", "CLAUDE_CODE_SUBAGENT_MODEL",
    "CLAUDE_CODE_FILE_READ_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_GIT_BASH_PATH", "CLAUDE_CODE_PROXY_RESOLVES_HOSTS",
    "CLAUDE_CODE_SHELL", "CLAUDE_CODE_SHELL_PREFIX", "CLAUDE_CODE_TMPDIR",
))  # fmt: skip
CLAUDE_SETTING_FAMILIES = (
    "CLAUDE_BASH_", "CLAUDE_ENABLE_", "CLAUDE_CODE_CLIENT_", "CLAUDE_CODE_DISABLE_", "CLAUDE_CODE_ENABLE_", "CLAUDE_CODE_MAX_",
    "CLAUDE_CODE_OTEL_", "CLAUDE_CODE_SKIP_", "CLAUDE_CODE_USE_",
)  # fmt: skip

# How long an attempt may take with workers that hooks and the service start, unless the file says.
TIMEOUT, TIMEOUT_DEFAULT = "TASK_QUEUE_TIMEOUT", "6h"

HEAD = """\
# The environment of workers that hooks and `tq service` start. A line is NAME=value, taken as it
# stands: no quotes, no $NAME, no continuation. USER, XDG_RUNTIME_DIR and DBUS_SESSION_BUS_ADDRESS
# are added; nothing of a Claude Code session is. The next worker that starts obeys a change.
"""
EXAMPLES = """\
# List here the variables that handlers need. Remove the # to use a line:
#ANTHROPIC_API_KEY=sk-ant-...
#CLAUDE_CONFIG_DIR=/home/me/.claude-work
#HTTPS_PROXY=http://proxy.example:3128
#AWS_PROFILE=work
#UV_DEFAULT_INDEX=https://pypi.example/simple
#LYCHEE_ONLINE=1
#TASK_QUEUE_TIMEOUT=6h
#TASK_QUEUE_NOTIFY=~/.claude/automation/lychee/handlers/notify.sh
#NTFY_TOPIC=a-name-that-nobody-guesses
"""


class Unfit(ValueError):
    """The file cannot be used; the message names the line, why, and what to do."""


def enter(file: Path, state: Path) -> None:
    """Replace this process's environment by the file's, and change to HOME. Raises Unfit."""
    environ = of_worker(file) | {"TASK_QUEUE_STATE": str(state)}
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(environ["HOME"] if os.path.isdir(environ["HOME"]) else "/")


def of_worker(file: Path) -> dict[str, str]:
    """Return the whole environment of a worker: defaults, the file's lines, the account's variables."""
    home = os.environ.get("HOME") or account().pw_dir
    return defaults(home) | {TIMEOUT: TIMEOUT_DEFAULT} | read(file) | of_the_account()


def read(file: Path) -> dict[str, str]:
    """Return the variables in the file; none where the file does not exist. Raises Unfit."""
    return parse(private_text(file), file)


def private_text(file: Path) -> str:
    """Return the text of a file that only its owner may read; "" if it does not exist. Raises Unfit."""
    try:
        with open(file, "rb") as opened:
            status, text = os.fstat(opened.fileno()), os.fsdecode(opened.read())
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Unfit(f"{file} cannot be read: {error.strerror}") from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise Unfit(f"{file} is not yours alone: chown it to yourself, and chmod 600 it")
    return text


def parse(text: str, file: Path) -> dict[str, str]:
    """Return the variables in the text of such a file. Raises Unfit."""
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise Unfit(f"{file}: line {number} is not NAME=value: mend it, or begin it with #")
        if re.search("[\x00-\x1f\x7f]", value):
            raise Unfit(f"{file}: line {number} has a control character in the value of {name}")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            raise Unfit(
                f"{file}: line {number}: the quotes would be a part of {name}: take them away"
            )
        found[name] = value
    return found


def account() -> pwd.struct_passwd:
    """Return this user's entry of the password database, or one made up for an unknown number."""
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        uid = os.getuid()
        return pwd.struct_passwd((str(uid), "", uid, os.getgid(), "", "/", "/bin/sh"))


def of_the_account() -> dict[str, str]:
    """Return USER and the address of the session bus, which notify-send needs."""
    found, runtime = {"USER": account().pw_name}, f"/run/user/{os.getuid()}"
    if is_ours(runtime):
        found["XDG_RUNTIME_DIR"] = runtime
    if os.path.exists(f"{runtime}/bus"):
        found["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={runtime}/bus"
    return found


def defaults(home: str) -> dict[str, str]:
    """Return the variables for an environment file that is missing or lacks them."""
    path = search_path([], home, None)
    return {
        "HOME": home,
        "LANG": "C.UTF-8",
        "PATH": path,
        "UV": shutil.which("uv", path=path) or "",
        "UV_PYTHON": own_python(),
    }


def search_path(entries: Iterable[str], home: str, uv: str | None) -> str:
    """Return a PATH of directories that are root's or ours, that of the real uv first."""
    usual = (f"{home}/.local/bin", f"{home}/.cargo/bin", "/opt/homebrew/bin", *STANDARD_PATH)
    # The environment that uv made for this script has no programs for handlers.
    own = {os.path.dirname(sys.executable)} - {*STANDARD_PATH}
    wanted = [*([os.path.dirname(uv)] if uv else []), *(e for e in entries if e not in own), *usual]
    # Install makes this one for its command, perhaps later.
    later = usual[0] if not os.path.lexists(usual[0]) else None
    kept = (entry for entry in dict.fromkeys(wanted) if entry == later or is_ours(entry))
    return os.pathsep.join(kept)


def is_ours(directory: str) -> bool:
    """Return whether a path is absolute, fits a line, and is a directory of root's or ours."""
    if not os.path.isabs(directory) or re.search("[\x00-\x1f\x7f]", directory):
        return False
    try:
        return os.path.isdir(directory) and os.stat(directory).st_uid in (0, os.getuid())
    except OSError:
        return False


def own_python() -> str:
    """Return the interpreter that runs this, outside any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def find_uv(environ: Mapping[str, str]) -> str | None:
    """Return the uv that an environment names, else the first on its PATH, or None."""
    named = environ.get("UV") or ""
    if os.path.isabs(named) and os.access(named, os.X_OK):
        return named
    found = shutil.which("uv", path=environ.get("PATH", ""))
    return found if found and os.path.isabs(found) else None


# ---------------------------------------------------------------------- a handler's environment


def handler_environment(
    environ: Mapping[str, str], without: Collection[str] = ()
) -> dict[str, str]:
    """Return the environment that all handlers get.

    It lacks the names in `without`, all that names a session, and uv's own variables of the
    worker's run. An empty or relative entry of PATH or PYTHONPATH goes, too: it would be looked for
    in the workspace. uv reads no uv.toml.
    """
    env = {
        name: value
        for name, value in environ.items()
        if name not in without and not _names_a_session(name)
    }
    env.pop("UV_RUN_RECURSION_DEPTH", None)
    env["UV_NO_CONFIG"] = "1"
    ours = os.path.join(env.pop("VIRTUAL_ENV", "/dev/null"), "bin")
    path = [entry for entry in absolute_entries(env.get("PATH", "")) if entry != ours]
    env["PATH"] = os.pathsep.join(path) or os.defpath
    modules = absolute_entries(env.pop("PYTHONPATH", ""))
    return env | ({"PYTHONPATH": os.pathsep.join(modules)} if modules else {})


def _names_a_session(name: str) -> bool:
    return (
        name.startswith("CLAUDE")
        and name not in CLAUDE_SETTINGS
        and not name.startswith(CLAUDE_SETTING_FAMILIES)
    )


def absolute_entries(path: str) -> list[str]:
    """Return the absolute entries of a search path."""
    return [entry for entry in path.split(os.pathsep) if os.path.isabs(entry)]


def python_for(program: str, environ: Mapping[str, str]) -> str:
    """Return the absolute path of a Python that fits a handler's requires-python. Raises LookupError.

    With it as UV_PYTHON, uv does not look for a Python in the workspace. uv only warns if UV_PYTHON
    does not fit, so this chooses one that does.
    """
    try:
        changed = os.stat(program).st_mtime_ns
    except OSError:
        # The start of the handler will fail, and say so.
        return own_python()
    return _python_for(program, changed, find_uv(environ), environ.get("HOME", "/"))


@lru_cache(256)
def _python_for(program: str, changed: int, uv: str | None, home: str) -> str:
    wanted = requires_python(program)
    at_least = re.fullmatch(r">=\s*3\.(\d+)", wanted)
    if not wanted or uv is None or at_least and sys.version_info >= (3, int(at_least[1])):
        return own_python()
    import subprocess

    command = [uv, "python", "find", "--no-config", "--system", wanted]
    env = {"HOME": home, "PATH": search_path([], home, uv)}
    found = subprocess.run(
        command, check=False, cwd="/", env=env, stdin=subprocess.DEVNULL, capture_output=True
    )
    python = os.fsdecode(found.stdout).strip()
    if found.returncode or not os.path.isabs(python):
        raise LookupError(
            f"{program} requires Python {wanted}, and none is here: install one (uv python install),"
            " then retry the task"
        )
    return python


def requires_python(program: str) -> str:
    """Return the requires-python of a script's PEP 723 header, or ""."""
    with open(program, "rb") as file:
        head = file.read(65536).decode("utf-8", "replace")
    block = re.search(r"^# /// script$(.*?)^# ///$", head, re.MULTILINE | re.DOTALL)
    found = block and re.search(r"^# requires-python\s*=\s*[\"'](.*?)[\"']", block[1], re.MULTILINE)
    return found[1] if found else ""


# -------------------------------------------------------------------------------- install and doctor


def text_of(variables: Mapping[str, str]) -> str:
    """Return the text of a new file with these variables and examples of more."""
    return HEAD + lines_of(variables) + EXAMPLES


def with_lines(text: str, variables: Mapping[str, str]) -> str:
    """Return the file's text with a line for each of these variables, replaced or added."""
    for name, value in variables.items():
        line = f"{name}={value}"
        new, count = re.subn(f"^{name}=.*$", lambda _, line=line: line, text, flags=re.MULTILINE)
        text = new if count else f"{text.rstrip()}\n{line}\n"
    return text


def lines_of(variables: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items() if value)


def decisive(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that choose account and network, if their values fit a line."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if DECISIVE.fullmatch(name) and value and not re.search("[\x00-\x1f\x7f]", value)
    }


def differences(file: Path, environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the decisive variables of `environ` that the file lacks, and those it has otherwise."""
    here, there = decisive(environ), decisive(read(file))
    lacking = sorted(here.keys() - there.keys())
    return lacking, sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
