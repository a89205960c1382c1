"""Each recipe of docs/recipes.md is pasted as printed into a HOME with an installation, and does what
its title says.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from homes import Home, blocks_of, install

TEXT = (ROOT / "docs/recipes.md").read_text()
RECIPES = {
    title: blocks_of(text, "bash")
    for title, text in re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", TEXT)
}
# What is looked at after a recipe was pasted, by its title.
EFFECTS: dict[str, Callable[[Home, str], None]] = {}


def recipe(title: str) -> Callable:
    """Declare that a function looks at a recipe's effect, given the HOME and what was printed."""
    return lambda effect: EFFECTS.setdefault(title, effect)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A HOME with an installation, and programs of its own in ~/bin, the first on its PATH."""
    made = Home(tmp_path_factory.mktemp("recipes") / "home")
    for name in ("bin", ".claude"):
        (made.directory / name).mkdir(parents=True)
    made.env["PATH"] = f"{made.directory}/bin:{made.env['PATH']}"
    install(made.directory, "--command", "tq", env={"PATH": made.env["PATH"]})
    # Workers take their packages from where the other tests have them.
    with open(made.prefix / "environment", "a") as file:
        file.write(f"UV_CACHE_DIR={made.env['UV_CACHE_DIR']}\nUV_OFFLINE=1\n")
    shutil.copytree(made.directory, made.directory.with_name("kept"), symlinks=True)
    return made


@pytest.fixture
def home(installed):
    """That HOME, as it was installed."""
    shutil.rmtree(installed.directory)
    kept = installed.directory.with_name("kept")
    shutil.copytree(kept, installed.directory, symlinks=True)
    return installed


def put(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def program(home: Home, name: str, text: str) -> None:
    put(home.directory / "bin" / name, text)


def handler(home: Home, name: str, text: str) -> None:
    put(home.prefix / "handlers" / name, text)


# Stands in for Claude Code. It commits each file that its prompt names, and pushes if it may.
CLAUDE = """#!/bin/sh
prompt=$(cat)
for file in $(echo "$prompt" | grep -o '[a-z]*\\.md'); do
    echo proofread >>"$file" && git commit -qam "$file"
    if [ "$file" = same.md ]; then git reset -q --hard HEAD~1; fi
done
denied='{"tool_name": "Bash", "tool_input": {"command": "git push"}}'
case "$prompt $*" in *Bash*push*) git push -q && denied= ;; *push*) ;; *) denied= ;; esac
echo '{"type": "system", "subtype": "init", "session_id": "s"}'
echo '{"type": "result", "is_error": false, "result": "Done.", "total_cost_usd": 0, "permission_denials": ['"$denied"']}'
"""


WITH_NOTES = (
    "Ask me before it pushes",
    "A worktree for each",
    "Every weekday at nine, summarise yesterday's commits",
    "Check the notes' links every night",
)


def make_notes(home: Home) -> None:
    """Make ~/notes, a repository with a remote."""
    program(home, "claude", CLAUDE)
    (home.directory / "notes").mkdir()
    home.paste("""
        git config --global user.name t && git config --global user.email t@localhost
        git init -q --bare remote && cd notes && git init -q && git remote add origin ../remote
        for name in one two same; do echo "$name" >"$name.md"; done
        git add . && git commit -qm first && git push -qu origin HEAD""")


def drain(home: Home, queue: str) -> None:
    """Run a queue's tasks as a worker that a hook starts does."""
    home.paste(
        f"tq work {queue} --drain --backoff 0 --environment ~/.claude/automation/lychee/environment"
    )


# Each directory says what ran in it, and when it began and ended; the tests of boats fail.
MAKEFILE = """test build deploy:
\t@echo begin $@ {name} >>$$HOME/ran; sleep 0.1; echo end $@ {name} >>$$HOME/ran
\t@test $@ != test || test {name} != boats
"""


def ran(home: Home) -> list[str]:
    return (home.directory / "ran").read_text().splitlines()


def test_each_recipe_has_one_block_and_an_effect():
    assert {title: len(blocks) for title, blocks in RECIPES.items()} == dict.fromkeys(EFFECTS, 1)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_does_what_its_title_says(home, title):
    # No test reaches the network: this is what would.
    curl = 'for last; do :; done\n{ echo "to $last"; cat; echo; } >>"$HOME/sent"'
    program(home, "curl", f"#!/bin/sh\n{curl}\n")
    program(home, "notify-send", "#!/bin/sh\nexit 1\n")
    program(home, "claude", "#!/bin/sh\necho '2.1.332 (Claude Code)'\n")
    if title in WITH_NOTES:
        make_notes(home)
    for name in ("pier", "boats", "tides"):
        (home.directory / name).mkdir()
        (home.directory / name / "Makefile").write_text(MAKEFILE.format(name=name))
    if title in BEFORE:
        BEFORE[title](home)
    printed = home.paste(RECIPES[title][0])
    EFFECTS[title](home, printed)


@recipe("Tell my phone when a run failed")
def tells_the_phone(home, printed):
    [topic] = re.findall(r"Subscribe to (tq-[0-9a-f]{16}) in the app", printed)
    sent = home.directory / "sent"
    test = f"to https://ntfy.sh/{topic}\nnotifications: example example failed: this is a test\n"
    assert sent.read_text() == test and "exit 0" in printed
    handler(home, "bad", "#!/bin/sh\necho no such file >&2\nexit 65\n")
    home.paste("tq add notifications bad --task-id it")
    drain(home, "notifications")
    wait_for(lambda: "bad it failed" in sent.read_text(), what="the message")
    assert sent.read_text().endswith(
        "bad it failed: refused by its handler (exit 65): no such file\n"
    )


@recipe("Wake Claude when a link it wrote is broken")
def wakes_claude(home, printed):
    settings = json.loads((home.directory / ".claude/settings.json").read_text())
    hooks = [hook for group in settings["hooks"]["Stop"] for hook in group["hooks"]]
    [wake] = [hook for hook in hooks if hook.get("asyncRewake")]
    assert "the wake-up" in printed and re.search(r"ok +wake", printed)
    readme = home.directory / "notes/README.md"
    readme.parent.mkdir()
    readme.write_text("[the pier](pier.md)\n")
    payload = {"session_id": "s", "prompt_id": "p", "cwd": str(readme.parent)}
    payload = json.dumps({**payload, "hook_event_name": "Stop", "stop_hook_active": False})
    broken = """echo '{"summary": "1 broken link", "failed": 1, "broken": [{}], "skipped": []}'"""
    handler(home, "link_validation", f"#!/bin/sh\n{broken}\n")
    place = home.prefix / "runtime/hook"
    waits = subprocess.Popen(
        ["/bin/sh", "-c", wake["command"]],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=home.env, text=True,
    )  # fmt: skip
    waits.stdin.write(payload)
    waits.stdin.close()
    waits.stdin = None
    check = "notifications link_validation --on-duplicate rerun --once-per workspace"
    subprocess.run(
        ["/bin/sh", place, *check.split()], input=payload, env=home.env, text=True, check=True
    )
    drain(home, "notifications")
    said = waits.communicate(timeout=60)[1]
    assert waits.returncode == 2 and "1 broken link" in said


@recipe("Never more than 20 dollars a day")
def stops_at_20_dollars(home, printed):
    assert "approvals: $0.00 of $20.00 a day are spent" in printed
    handler(home, "spend", """#!/bin/sh\necho '{"cost_usd": 12}'\n""")
    for task_id in ("a", "b", "c"):
        home.paste(f"tq add approvals spend --task-id {task_id}")
    drain(home, "approvals")
    assert home.rows("select task_id from approvals") == [("c",)]
    assert "$24.00 of $20.00 a day are spent" in home.paste("tq list")


@recipe("Ask me before it pushes")
def asks_before_it_pushes(home, printed):
    assert "wants: Bash(git push)" in printed
    home.paste("cd notes && git commit -q --allow-empty -m second")
    last = "git -C remote log -1 --format=%s"
    assert home.paste(last) == "first\n"
    home.paste("tq approve push-notes && tq work approvals --drain")
    assert home.paste(last) == "second\n"
    told = "select status, attempts from task_history where task_id = 'push-notes'"
    assert home.rows(told) == [("completed", 1)]


@recipe("A worktree for each")
def each_has_a_worktree(home, printed):
    branches = re.findall(r"^\+ (tq/proofread-\w+-md-\w+)$", printed, re.M)
    assert [branch.split("-")[1] for branch in branches] == ["one", "two"]
    assert home.paste("cd notes && git status --porcelain && git log --format=%s") == "first\n"
    for branch in branches:
        home.paste(f"cd notes && git merge -q --no-edit {branch}")
    assert home.paste("cat notes/*.md").split() == ["one", "proofread", "same", "two", "proofread"]


@recipe("Every weekday at nine, summarise yesterday's commits")
def summarises_commits(home, printed):
    assert "digest: next at " in printed and "completed: Done." in " ".join(printed.split())
    [(schedule, next_at)] = home.rows("select schedule, next_at from task_every")
    when = time.localtime(next_at)
    assert schedule == "0 9 * * 1-5" and (when.tm_hour, when.tm_min) == (9, 0) and when.tm_wday < 5


@recipe("Run the tests of three repositories tonight, one after the other, and tell me")
def runs_tests_tonight(home, printed):
    assert printed.count("starts at ") == 3 and not (home.directory / "ran").exists()
    home.paste(
        f"sqlite3 '{home.prefix}/state/tasks.db' 'update notifications set due_at = 1 where due_at > 0'"
    )
    drain(home, "notifications")
    assert ran(home) == [
        f"{word} test {name}" for name in ("pier", "boats", "tides") for word in ("begin", "end")
    ]
    told = (home.directory / "tests-of-tonight.txt").read_text()
    assert re.search("failed .*test-boats", told) and re.search("completed .*test-tides", told)


@recipe("Deploy when both builds are done")
def deploys_after_builds(home, printed):
    drain(home, "notifications")
    assert ran(home)[-1] == "end deploy pier" and {"end build pier", "end build boats"} < {
        *ran(home)[:4]
    }


@recipe("Check the notes' links every night")
def checks_links(home, printed):
    assert "links: next at " in printed
    handler(home, "link_validation", "#!/bin/sh\ncat\n")
    drain(home, "notifications")
    [(result,)] = home.rows("select result from task_history where task_id = 'links'")
    assert json.loads(result)["data"] == {"workspace_path": f"{home.directory}/notes"}


@recipe("A backup every night, of a week")
def backs_up(home, printed):
    drain(home, "notifications")
    [backup] = (home.directory / "backups").iterdir()
    assert backup.name == f"tq-{time.strftime('%a')}.db"
    # In the backup, the task that made it runs.
    home.paste("tq every backup --now")
    drain(home, "notifications")
    assert home.rows("select status, count(*) from task_history group by 1") == [("completed", 2)]


def ends_side_by_side(home):
    program(home, "claude", """#!/bin/sh
cat >/dev/null; echo "begin $PWD" >>"$HOME/ran"; sleep 0.3; echo "end $PWD" >>"$HOME/ran"
echo '{"type": "system", "subtype": "init", "session_id": "s"}'
echo '{"type": "result", "is_error": false, "result": "Done.", "total_cost_usd": 0}'
""")  # fmt: skip


@recipe("One at a time in each repository")
def one_at_a_time(home, printed):
    for name in ("pier", "boats"):
        here = [line.split()[0] for line in ran(home) if line.endswith(name)]
        assert here == ["begin", "end"] * 2
    assert home.rows("select count(*) from task_history where status = 'completed'") == [(4,)]


def has_failed(home):
    script = """grep -q '"colour": "red"' || { echo no colour >&2; exit 65; }"""
    handler(home, "fussy", f"#!/bin/sh\n{script}\n")
    home.paste("tq add notifications fussy '{}' --task-id it")
    drain(home, "notifications")
    program(home, "vi", """#!/bin/sh\necho '{"colour": "red"}' >"$1"\n""")


@recipe("See why it failed, mend it, and try again")
def is_mended(home, printed):
    assert "it: changed; it is pending" in printed
    drain(home, "notifications")
    assert home.rows("select status from task_history order by id desc limit 1") == [("completed",)]


# What is there before a recipe is pasted, by its title.
BEFORE = {
    "One at a time in each repository": ends_side_by_side,
    "See why it failed, mend it, and try again": has_failed,
}
