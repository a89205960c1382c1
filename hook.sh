#!/bin/sh
# Hands the payload of a Claude Code hook to the queue: hook QUEUE [TASK_TYPE] [OPTION ...]
# The options are those of enqueue.py. Or tells Claude what became of a workspace's tasks: hook --report
# install.py copies this file to PREFIX/runtime/hook and fills in the four paths below. The plugin runs
# it as it stands.
# Exit status 2 would block Claude and never leaves this file. stdout can end up in Claude's context:
# only a report does.
asked=${TASK_QUEUE_STATE:-}
lib=
python=
uv=
TASK_QUEUE_STATE=
case ${1:-} in
--report) report=yes ;;
*) report= && exec >/dev/null ;;
esac
worker=
if [ -z "$lib" ]; then
    lib=${0%/*}
    case $lib in /*) ;; *) lib=$PWD/$lib ;; esac
    # A file to read that is missing would end this shell with 2.
    [ -r "$lib/places.sh" ] || exit 1
    # shellcheck source=places.sh disable=SC1091
    . "$lib/places.sh"
fi

# The session's environment decides neither which Python and uv run nor what they import: a workspace
# may have set it. Only names are looked at: a value of several lines can at most remove one more.
set -f
IFS='
'
for name in $(export -p); do
    name=${name#export }
    name=${name#declare -x }
    name=${name%%=*}
    case $name in
    *[!A-Z0-9_]* | UV_CACHE_DIR | UV_OFFLINE) ;;
    UV* | PYTHON* | VIRTUAL_ENV | CONDA_PREFIX) unset "$name" ;;
    esac
done
case ${UV_CACHE_DIR:-/} in /*) ;; *) unset UV_CACHE_DIR ;; esac

# An empty or a relative entry of PATH means the working directory, which is the workspace.
IFS=:
clean=
for entry in ${PATH:-}; do
    case $entry in /*) clean=$clean$entry: ;; esac
done
unset IFS
set +f
PATH=$clean${uv:+${uv%/*}:}/usr/bin:/bin
if [ -n "$uv" ]; then export UV="$uv"; fi

# A relative state would be another one in every workspace.
case $asked in [~]/*) [ -z "${HOME:-}" ] || asked=$HOME/${asked#??} ;; esac
case $asked in
'') ;;
/*[[:cntrl:]]*) echo "TASK_QUEUE_STATE has control characters and was ignored: the task goes to $TASK_QUEUE_STATE" >&2 ;;
/*) TASK_QUEUE_STATE=$asked ;;
*) echo "TASK_QUEUE_STATE is not absolute and was ignored: the task goes to $TASK_QUEUE_STATE" >&2 ;;
esac
export TASK_QUEUE_STATE PATH

# 2, 126 and 127 come from an interpreter that did not get as far as the script: stdin is unread.
# -E and not -I: a script of an older version would not find its module.
run() {
    code=127
    if [ -x "$python" ] && [ -r "$1" ]; then
        "$python" -E -s "$@"
        code=$?
    fi
    case $code in 2 | 126 | 127)
        # uv runs the interpreter of a .venv in its working directory or above, which is a workspace's.
        # --no-config: nor has a uv.toml or a .python-version a say.
        # The script goes back to where this was fired.
        if [ -x "$uv" ] && [ -r "$1" ]; then
            (
                export TASK_QUEUE_CWD="${PWD:-}"
                cd / && exec "$uv" run -qq --offline --no-config --script "$@"
            )
            code=$?
        fi ;;
    esac
    case $code in 2 | 126 | 127) ;; *) exit $code ;; esac
}
if [ -n "$report" ]; then
    run "$lib/report.py" --hook
    echo "no report: no Python 3.11 was found" >&2
    exit 1
fi
run "$lib/enqueue.py" --hook "$@" ${worker:+--worker-from "$worker"}

# Without Python the payload goes to the spool, as it came: a worker makes a task of it by the same
# rules as enqueue.py.
fail() {
    echo "the task was not stored: no Python 3.11 was found, and $1" >&2
    exit 1
}
PATH=/usr/bin:/bin:$PATH
LC_ALL=C
umask 077
case ${1:-} in
'' | [!a-z]* | *[!a-z0-9_]* | task_* | sqlite_*) fail "'${1:-}' is not a queue's name" ;;
esac
# A hook that fires inside a handler's own run stores nothing: work must not start itself again.
if [ "${TASK_DEPTH:-0}" -gt 0 ] 2>/dev/null; then
    case " $* " in *" --nested "*) ;; *) exit 0 ;; esac
fi

spool=$TASK_QUEUE_STATE/spool/$1
# mkdir -p gives the mode of umask to what it makes, and leaves alone what is there.
mkdir -p "$spool" 2>/dev/null || fail "$spool cannot be made"
new=$(mktemp "$spool/.XXXXXXXXXX" 2>/dev/null) || fail "$spool cannot be written"
# A closed stdin is an empty one.
incomplete=
(: 3<&0) 2>/dev/null || exec </dev/null
{
    printf '%s\0' "$#" "$@" "${PWD:-}" "${CLAUDE_PROJECT_DIR:-}" "${TASK_DEPTH:-0}" || incomplete=yes
    # stdin may never close: what came within a second is the payload.
    # A command in the background has /dev/null for its stdin, so it gets the payload as descriptor 3.
    cat <&3 &
    reader=$!
    { sleep 1; kill -s KILL "$reader"; } >/dev/null 3<&- &
    guard=$!
    wait "$reader"
    case $? in 0 | 137) ;; *) incomplete=yes ;; esac
    kill -s KILL "$guard"
    wait "$guard"
} 2>/dev/null >"$new" 3<&0
if [ -n "$incomplete" ]; then
    rm -f "$new"
    fail "the payload could not be copied to $spool"
fi
mv "$new" "$spool/$(date +%s)-${new##*/.}.hook" || fail "$spool cannot be written"
exit 0
