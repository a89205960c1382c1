"""Each recipe of docs/recipes.md is pasted as printed into a HOME with an installation, and does what
its title says.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

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


@pytest.fixture
def home(tmp_path):
    """A HOME with an installation, and programs of its own in ~/bin, the first on its PATH."""
    made = Home(tmp_path)
    (made.directory / "bin").mkdir()
    made.env["PATH"] = f"{made.directory}/bin:{made.env['PATH']}"
    (made.directory / ".claude").mkdir()
    install(made.directory, "--command", "tq", env={"PATH": made.env["PATH"]})
    return made


def program(home: Home, name: str, text: str) -> None:
    path = home.directory / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def handler(home: Home, name: str, text: str) -> None:
    path = home.prefix / "handlers" / name
    path.write_text(text)
    path.chmod(0o755)


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


WITH_NOTES = ("Ask me before it pushes", "A worktree for each")


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


def test_each_recipe_has_one_block_and_an_effect():
    assert {title: len(blocks) for title, blocks in RECIPES.items()} == dict.fromkeys(EFFECTS, 1)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_does_what_its_title_says(home, title):
    # No test reaches the network: this is what would.
    program(
        home,
        "curl",
        '#!/bin/sh\nfor last; do :; done\n{ echo "to $last"; cat; echo; } >>"$HOME/sent"\n',
    )
    program(home, "notify-send", "#!/bin/sh\nexit 1\n")
    program(home, "claude", "#!/bin/sh\necho '2.1.332 (Claude Code)'\n")
    if title in WITH_NOTES:
        make_notes(home)
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
