"""Complete a command line of tq: `tq complete TABLE plain|told WORD ...`, the last word unfinished.

A shell runs it at each Tab, so it starts alone, by `python -I -S`: it imports none of our modules.
TABLE is printed by `tq completion`, a line for each command.
"""

import os
import re
import sqlite3
import sys

MOST = 60
SHOWN_CHARS = 60
# What a word may have that no shell takes for something else.
PLAIN = re.compile(r"[\w.:@%+,/=-]+")
QUEUES = """
select tbl_name from sqlite_master where type = 'index' and name = tbl_name || '.ready' order by 1"""
LIVE_TYPES = """
select distinct task_type from (select task_type from "{queue}" order by id desc limit 1000)
where task_type is not null"""
# One look into the index for each type, not one for each task.
ENDED_TYPES = """
with recursive each(type) as (
  select (select min(task_type) from task_history where queue = '{queue}')
  union all
  select (select min(task_type) from task_history where queue = '{queue}' and task_type > type)
  from each where type is not null)
select type from each where type is not null"""
WAITING = "case when status < 2 then 'pending' when status = 2 then 'in_progress' else 'waits' end"
LIVE_IDS = f"""
select coalesce(task_id, '{{queue}}-' || id), '{{queue}} ' || coalesce(task_type, '') || ' ' || {WAITING}
from "{{queue}}" where {{only}} and {{match}} order by {{order}} limit {MOST}"""
ENDED_IDS = f"""
select task_id, queue || ' ' || task_type || ' ' || status from task_history
where {{match}} order by {{order}} limit {MOST}"""
BEGINS = "task_id >= :word and task_id < :word || char(1114111)"
# Which tasks a command is about; the others take any.
HELD = "status = 3 and due_at is null"
ABOUT = {"approve": (HELD, False), "reject": (HELD, False), "retry": ("0", True)}
ABOUT |= dict.fromkeys(("cancel", "move", "edit", "drop"), ("1", False))


def main(argv: list[str]) -> int:
    if len(argv) < 3:
        return 64
    table = {line.split("\t")[0]: line.split("\t")[1:] for line in argv[0].split("\n")}
    # bash takes --queue=a for three words.
    words = [word for word in argv[2:-1] if word != "="] + ["" if argv[-1] == "=" else argv[-1]]
    try:
        found = candidates(table, words)
    except sqlite3.Error:
        return 1
    for name, says in sorted(found.items()):
        if PLAIN.fullmatch(name):
            says = "".join(c if c.isprintable() else " " for c in says or "")[:SHOWN_CHARS]
            print(f"{name}\t{says}" if says and argv[1] == "told" else name)
    return 0


def candidates(table: dict[str, list[str]], words: list[str]) -> dict[str, str]:
    """Return the words that may stand in the place of the last one, and what each is."""
    *before, word = words
    if not before or before == ["help"]:
        return those_like(word, {name: row[0] for name, row in table.items()})
    command = before[0]
    if command not in table or "--" in before:
        return {}
    _, arguments, texts = table[command]
    parts = (text.partition("=") for text in texts.split())
    options = {name: kind for name, _, kind in parts}
    if options.get(before[-1]):
        return values(options[before[-1]], word, command)
    if word.startswith("-") and "=" in word:
        name, _, begun = word.partition("=")
        found = values(options.get(name, ""), begun, command)
        return {f"{name}={value}": says for value, says in found.items()}
    if word.startswith("-"):
        return those_like(word, dict.fromkeys(options, ""))
    given = [
        each
        for at, each in enumerate(before[1:])
        if not each.startswith("-") and not options.get(before[at])
    ]
    kinds = arguments.split()
    # An ID may be one of several, with a QUEUE behind them.
    kinds = kinds if kinds[:1] == ["ID"] else kinds[len(given) :][:1] or kinds[-1:]
    return {name: says for kind in kinds for name, says in values(kind, word, command).items()}


def those_like(word: str, names: dict[str, str]) -> dict[str, str]:
    return {name: says for name, says in names.items() if name.startswith(word)}


def values(kind: str, word: str, command: str) -> dict[str, str]:
    """Return the values of a kind that begin with a word: QUEUE, TYPE, ID, or words to choose from."""
    if kind not in ("QUEUE", "TYPE", "ID"):
        names = kind.split(",") if re.fullmatch("[a-z_,-]+", kind) else []
        return those_like(word, dict.fromkeys(names, ""))
    home = os.path.expanduser("~/.claude/automation/lychee/state")
    db = os.path.join(os.environ.get("TASK_QUEUE_STATE") or home, "tasks.db")
    if not os.path.exists(db):
        return {}
    from urllib.parse import quote

    uri = f"file:{quote(os.fsencode(os.path.realpath(db)))}?mode=ro"
    conn = sqlite3.connect(uri, uri=True, timeout=0.05)
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    queues = [name for (name,) in conn.execute(QUEUES)]
    if kind == "QUEUE":
        return those_like(word, dict.fromkeys(queues, ""))
    if kind == "TYPE":
        return those_like(word, dict.fromkeys(types_of(conn, queues), ""))
    return ids_of(conn, queues, word, *ABOUT.get(command, ("1", True)))


def types_of(conn: sqlite3.Connection, queues: list[str]) -> list[str]:
    """Return the types of tasks that wait, run or have ended."""
    statements = [text.format(queue=name) for name in queues for text in (LIVE_TYPES, ENDED_TYPES)]
    return [str(kind) for each in statements for (kind,) in conn.execute(each)]


def ids_of(
    conn: sqlite3.Connection, queues: list[str], word: str, only: str, ended: bool
) -> dict[str, str]:
    """Return the ids that begin with a word, of the newest tasks if there is none."""
    match, order = (BEGINS, "task_id") if word else ("1", "id desc")
    terms = {"match": match, "order": order}
    statements = [LIVE_IDS.format(queue=name, only=only, **terms) for name in queues if only != "0"]
    if word:
        # A task without an id of its own is called after its queue and row.
        named = "task_id is null and '{queue}-' || id like :word || '%'"
        statements += [
            LIVE_IDS.format(queue=name, only=only, match=named.format(queue=name), order="id desc")
            for name in queues
            if only != "0" and (word.startswith(f"{name}-") or f"{name}-".startswith(word))
        ]
    if ended:
        statements.append(ENDED_IDS.format(**terms))
    found: dict[str, str] = {}
    for statement in statements:
        found |= conn.execute(statement, {"word": word}).fetchall()
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
