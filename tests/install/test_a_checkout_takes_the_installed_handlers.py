"""A worker that runs from a checkout serves with the handlers of the installation, if there is one."""

import json

from conftest import ROOT


def test_a_checkout_takes_the_installed_handlers(installation):
    prefix = installation.directory / ".claude/automation/lychee"
    (prefix / "handlers").mkdir(parents=True)
    mine = prefix / "handlers/mine"
    mine.write_text('#!/bin/sh\necho \'{"from": "the installation"}\'\n')
    mine.chmod(0o755)
    task = installation.enqueue("notifications", "mine")
    (prefix / "installed.json").write_text("{}")
    done = installation.run("worker.py", "notifications", "--drain")
    assert done.returncode == 0, done.stderr
    assert json.loads(installation.history(task)["result"]) == {"from": "the installation"}


def test_without_an_installation_it_takes_its_own(installation):
    done = installation.run("worker.py", "--help")
    assert f"{ROOT}/handlers" in done.stdout.replace("\n", "").replace(" ", "")
