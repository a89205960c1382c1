"""Print the completion scripts of bash, zsh and fish.

A script holds a table of all commands and their options, read from their --help, and hands it with
the words of the command line to complete.py, which adds queues, types and ids from the database.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import queue_helpers as q
from taskqueue import cli
from taskqueue.arguments import CHOICES
from taskqueue.database import STATUSES
from taskqueue.remedies import SCRIPTS, installed_command

HELP = """Print a completion script, which completes queues, task types and ids as well.

    tq completion bash > ~/.local/share/bash-completion/completions/tq
    tq completion zsh > DIRECTORY/_tq           with a DIRECTORY of your fpath
    tq completion fish > ~/.config/fish/completions/tq.fish

Or in the shell's start file, at the cost of a moment at each start: source <(tq completion bash)
"""
BASH = r"""# Completion of NAME for bash, printed by: NAME completion bash
_NAME_table='TABLE'
_NAME() {
    local IFS=$'\n'
    COMPREPLY=($(NAME complete "$_NAME_table" plain "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _NAME COMMAND
"""
ZSH = r"""#compdef COMMAND
# Completion of NAME for zsh, printed by: NAME completion zsh
_NAME_table='TABLE'
_NAME() {
    local line
    local -a names shown
    for line in "${(@f)$(COMMAND complete "$_NAME_table" told "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        [[ -n $line ]] || continue
        names+=("${line%%$'\t'*}")
        shown+=("${line/$'\t'/  -- }")
    done
    if (( $#names )); then compadd -l -d shown -a names; else _files; fi
}
if [ "$funcstack[1]" = _NAME ]; then _NAME "$@"; else compdef _NAME COMMAND; fi
"""
FISH = r"""# Completion of NAME for fish, printed by: NAME completion fish
set -g _NAME_table 'TABLE'
function _NAME_complete
    set -l current (commandline -ct)
    set -l words (commandline -opc)
    set -l found (COMMAND complete "$_NAME_table" told $words[2..-1] "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c COMMAND -f -a '(_NAME_complete)'
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(argv: Sequence[str], commands: Mapping[str, cli.Parser], others: Mapping[str, str]) -> int:
    """Print the script of a shell. `commands` are the parsers of tasks.py; `others` have their own."""
    parser = cli.make_parser("tasks.py completion", HELP)
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(argv).shell
    command = installed_command() or "tq"
    name = command.replace("-", "_")
    table = "\n".join(table_of(commands, others))
    script = SHELLS[shell].replace("NAME complet", "COMMAND complet").replace("NAME", name)
    print(script.replace("COMMAND", command).replace("TABLE", table), end="")
    return 0


def table_of(commands: Mapping[str, cli.Parser], others: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each command: its name, what it does, its arguments and its options."""
    here = Path(q.__file__).parent
    for name, parser in sorted(commands.items()):
        if name not in others:
            yield line_of(name, parser.format_help())
    yield "\t".join(("completion", others["completion"], ",".join(SHELLS), ""))
    scripts = SCRIPTS | {name: f"tasks.py {name}" for name in others if name != "completion"}
    for name, script in sorted(scripts.items()):
        words = [sys.executable, "-E", "-s", str(here / script.split()[0]), *script.split()[1:]]
        done = subprocess.run([*words, "--help"], capture_output=True, text=True, check=False)
        yield line_of(name, done.stdout, others.get(name, ""))


def line_of(name: str, text: str, says: str = "") -> str:
    """Return a command's line, from its --help."""
    blocks = text.split("\n\n")
    usage = next((block for block in blocks if block.startswith("usage:")), "")
    heads = ("usage:", " ", "positional", "options")
    says = says or next((block for block in blocks if not block.startswith(heads)), "")
    # What stands in a shell's quotes.
    summary = re.sub(r"[^\w ,-]", "", re.split("[.:;(]", " ".join(says.split()))[0])
    return "\t".join((name, summary.strip(), arguments_of(name, text, usage), options_of(text)))


def arguments_of(name: str, text: str, usage: str) -> str:
    """Return the kinds of a command's arguments: QUEUE, TYPE, ID, or words to choose from."""
    if name == "run":
        return ""
    if verbs := re.findall(r"^    ([a-z-]+) ", text.partition("positional arguments")[2], re.M):
        return f"{','.join(verbs)} QUEUE"
    bare = re.sub(r"\[-[^]]*\]|-- .*", "", " ".join(usage.partition(" [options]")[0].split()))
    found = re.findall(r"\b(QUEUE|TYPE|ID|FILE)\b", bare.replace("TASK_TYPE", "TYPE"))
    return " ".join(dict.fromkeys(found))


def options_of(text: str) -> str:
    """Return a command's options, --NAME or --NAME=KIND."""
    options = {}
    for line in re.findall(r"^  (-.*?)(?:  |$)", text, re.M):
        names = re.findall(r"(?<![\w-])--[a-z-]+", line) or re.findall(r"^-\w", line)
        found = re.search(r" ([A-Z]+|\{[^}]*\})", line)
        for option in names:
            kind = found[1] if found else ""
            if kind == "STATUS":
                kind = ",".join(STATUSES)
            elif option[2:] in CHOICES and kind:
                kind = ",".join(CHOICES[option[2:]])
            elif option == "--task-id":
                kind = "NEW"
            options[option] = re.sub(r"[{}\s]", "", kind)
    return " ".join(f"{name}={kind}" if kind else name for name, kind in options.items())
