#!/bin/sh
# Keeps the firing of a Claude Code hook for the queue: hook QUEUE [TASK_TYPE] [OPTION ...]
# The options are those of enqueue.py. Or tells Claude what became of a workspace's tasks: hook --report
# Or waits for a session's tasks and wakes it: hook --wake
#
# A firing is one file in STATE/spool/QUEUE. Whoever looks at the queue next makes a task of it
# (taskqueue/hook.py), so nothing here needs Python, a database or a program that PATH chose.
# Exit status 2 would block Claude: only --wake ends so, for a client that takes it as a wake-up.
# stdout can end up in Claude's context: only a report does.
#
# install.py copies this file to PREFIX/runtime/hook and fills in the six paths below. The plugin
# runs it as it stands.
lib=
python=
uv=
state=
home=
packages=

# bash as sh takes functions from the environment.
unset -f cd command date dd echo env eval flock id kill ls mkdir mv printf pwd read rm setsid sleep sync timeout true ulimit umask wait [
unset LD_PRELOAD LD_AUDIT LD_LIBRARY_PATH
PATH=/usr/bin:/bin LC_ALL=C
export PATH
umask 077
set -f
[ "${1:-}" = --report ] || exec >/dev/null

fail() {
    echo "the task was not stored: $1" >&2
    exit 1
}

# Says whether a directory is ours, not writable by others, and in no workspace: its physical path.
ours() {
    both=$(pwd -P && cd -P -- "${CLAUDE_PROJECT_DIR:-.}" && pwd -P) 2>/dev/null
    here=${both%%
*} project=${both##*
}
    found=$(cd -P -- "$1" && pwd -P && ls -ldn .) 2>/dev/null || return 1
    physical=${found%
*}
    case $physical/ in /proc/* | "${here:-/}"/* | "${project:-/}"/*) return 1 ;; esac
    # dash, bash, busybox, mksh and zsh have -O.
    # shellcheck disable=SC3067
    case ${found##*
} in d????-??-*) [ -O "$physical" ] ;; *) return 1 ;; esac
}

# The plugin's hook: the session's home if that can be trusted, else the account's.
find_home() {
    lib=${0%/*}
    case $lib in /*) ;; *) lib=$PWD/$lib ;; esac
    lib=${lib%/bin}
    case ${HOME:-} in
    /*[[:cntrl:]]*) ;;
    /*) ! ours "$HOME" || home=$physical ;;
    esac
    if [ -z "$home" ]; then
        user=$(id -un)
        case $user in '' | *[!a-zA-Z0-9._-]*) ;; *) eval "home=~$user" ;; esac
        [ -d "$home" ] || fail "no home directory is yours alone"
    fi
    state=$home/.claude/automation/lychee/state environment=$home/.claude/automation/lychee/environment
}

# A name with a version needs no start to see whether it is new enough.
find_programs() {
    for place in "$home/.local/bin" /usr/local/bin /opt/homebrew/bin /usr/bin; do
        for name in python3.14 python3.13 python3.12 python3.11; do
            [ -x "$python" ] || python=$place/$name
        done
    done
    for place in "$home/.local/bin" "$home/.cargo/bin" /opt/homebrew/bin /usr/local/bin /usr/bin; do
        [ -x "$uv" ] || uv=$place/uv
    done
}

# The plugin's option says whether its hook wakes sessions. Only clients that were seen to support
# asyncRewake may: another one would take exit status 2 as a block. settings.py names the same version.
plugin_may_wake() {
    [ "${CLAUDE_PLUGIN_OPTION_WAKE:-}" = true ] || return
    version=${AI_AGENT#claude-code_}
    version=${version%%_*}
    case $version in
    2-1-*[!0-9]*) return 1 ;;
    2-1-*) [ "${version#2-1-}" -ge 332 ] ;;
    2-[2-9]-* | 2-[1-9][0-9]-*) ;;
    *) return 1 ;;
    esac
}

# The session may name a directory for tasks; it never supplies handlers or a worker.
choose_state() {
    asked=$TASK_QUEUE_STATE
    case $asked in [~]/*) asked=${HOME:-}/${asked#??} ;; esac
    case $asked in
    "$state") return ;;
    *[[:cntrl:]]* | */../* | */..) why='has control characters or ..' ;;
    /*)
        there=${asked%/}
        until [ -d "$there/" ]; do there=${there%/*}; done
        if ours "$there/"; then
            state=${physical%/}${asked#"$there"}
            return
        fi
        why="is not yours alone, or lies in the workspace" ;;
    *) why='is not absolute' ;;
    esac
    echo "TASK_QUEUE_STATE $why and was ignored: the task goes to $state" >&2
}

# Runs a program with nothing of the session but what is named here. Claude waits for it.
run_report() {
    env -i HOME="$home" PATH="$PATH" TASK_QUEUE_STATE="$state" \
        ${TASK_DEPTH:+TASK_DEPTH="$TASK_DEPTH"} ${CLAUDE_PID:+CLAUDE_PID="$CLAUDE_PID"} \
        ${CLAUDE_PROJECT_DIR:+CLAUDE_PROJECT_DIR="$CLAUDE_PROJECT_DIR"} \
        ${CLAUDE_CODE_SESSION_ATTENDED:+CLAUDE_CODE_SESSION_ATTENDED="$CLAUDE_CODE_SESSION_ATTENDED"} \
        "$@" "$lib/report.py" "$mode" ${told:+--marker "$told"}
    code=$?
    [ $code != 42 ] || exit 2
    # These come from an interpreter that did not get as far as the script: stdin is unread.
    case $mode$code in --wake1 | *[!0-9]2 | *126 | *127) ;; *) exit $code ;; esac
}

# Copies stdin, for a second at most: it may never close.
copy_payload() {
    if command -v timeout >/dev/null; then
        # A payload has 64 MiB at most.
        (ulimit -f 131072 && exec timeout 1 dd bs=65536 conv=fsync)
    else
        cat <&3 &
        reader=$!
        { sleep 1; kill "$reader"; } >/dev/null 3<&- &
        wait "$reader"
    fi
}

start_worker() {
    lock=$state/workers/serving.$1
    if [ -e "$lock" ]; then
        flock -n 9 9<"$lock"
        [ $? != 1 ] || return 0
    fi
    find_programs
    # The Python that uv made for worker.py saves a start of uv; "uv cache clean" removes it.
    [ ! -x "$packages" ] || python=$packages
    set -- "$lib/worker.py" "$1" --environment "$environment" \
        --single --idle-exit 60
    if [ -x "$python" ]; then
        set -- "$python" -E -s "$@"
    else
        [ -x "$uv" ] || return
        set -- "$uv" run -qq --no-config --script "$@"
    fi
    ! command -v setsid >/dev/null || set -- setsid "$@"
    mkdir -p "$state/logs" || return
    (cd / && exec env -i HOME="$home" PATH="$PATH" TASK_QUEUE_STATE="$state" "$@") \
        </dev/null >>"$state/logs/worker.$queue.log" 2>&1 &
}

environment=${lib%/runtime/lib}/environment
if [ -z "$lib" ]; then
    [ "${1:-}" != --wake ] || plugin_may_wake || exit 0
    find_home
    installed=${state%/*}/runtime/hook
    [ ! -r "$installed" ] || exec /bin/sh "$installed" "$@"
fi
[ -z "${TASK_QUEUE_STATE:-}" ] || choose_state

if [ "${1:-}" = --report ]; then
    # While no task has ended since this session was told, both are one file (taskqueue/report.py).
    case ${CLAUDE_CODE_SESSION_ATTENDED:-} in 0) attended=0 ;; *) attended=1 ;; esac
    told=$state/told${CLAUDE_PROJECT_DIR:-}/.$attended$PWD/.told
    case $told in */../* | */./*) told= ;; esac
    # dash, bash, busybox, mksh and zsh have -ef.
    # shellcheck disable=SC3013
    if [ "$told" -ef "$state/quiet" ] && [ ! -d "$state/waits" ]; then exit 0; fi
    mode=--hook
    find_programs
    cd / || exit 1
    [ ! -x "$python" ] || run_report "$python" -E -s
    [ ! -x "$uv" ] || run_report "$uv" run -qq --offline --no-config --script
    echo "no report: no Python 3.11 was found" >&2
    exit 1
fi

if [ "${1:-}" = --wake ]; then
    # Claude's own work and a session that nobody attends are not woken.
    [ "${CLAUDE_CODE_SESSION_ATTENDED:-}" != 0 ] || exit 0
    [ -z "${TASK_DEPTH:-}" ] || exit 0
    mode=--wake told=
    find_programs
    cd / || exit 1
    # watchdog lets it sleep; without, it looks again and again.
    [ ! -x "$packages" ] || run_report "$packages" -E -s
    [ ! -x "$uv" ] || run_report "$uv" run -qq --offline --no-config --with 'watchdog>=4' --script
    [ ! -x "$python" ] || run_report "$python" -E -s
    echo "nothing waits for the tasks: no Python 3.11 was found" >&2
    exit 1
fi

queue=${1:-}
case $queue in
'' | [!a-z]* | *[!a-z0-9_]* | task_* | sqlite_*) fail "'$queue' is not a queue's name" ;;
esac
nested='' worker=''
for word; do
    case $word in
    --nested) nested=yes ;;
    --start-worker) worker=yes ;;
    esac
done
# A handler's own run fired this: work must not start itself again.
[ -n "$nested" ] || ! [ "${TASK_DEPTH:-0}" -gt 0 ] 2>/dev/null || exit 0

spool=$state/spool/$queue
[ -d "$spool" ] || mkdir -p "$spool" 2>/dev/null || fail "$spool cannot be made"
{ read -r id </proc/sys/kernel/random/uuid; } 2>/dev/null || id=$(date +%s)-$$
new=$spool/.$id
# A closed stdin is an empty one.
{ true 3<&0; } 2>/dev/null || exec </dev/null
[ ! -t 0 ] || exec </dev/null
code=1
{
    printf '%s\0' hook-2 "$#" "$@" "${PWD:-}" "${CLAUDE_PROJECT_DIR:-}" \
        "${CLAUDE_CODE_SESSION_ATTENDED:-}" "${TASK_DEPTH:-0}" && copy_payload 3<&0
    code=$?
} 2>/dev/null >"$new"
case $code in
0) command -v timeout >/dev/null || sync ;;
# The second is over.
124 | 143) sync "$new" ;;
*)
    rm -f "$new"
    fail "$spool cannot be written" ;;
esac
mv "$new" "$spool/$id.hook" 2>/dev/null || fail "$spool cannot be written"
sync "$spool"
{ echo >"$state/wake"; } 2>/dev/null
[ -z "$worker" ] || start_worker "$queue" 2>/dev/null ||
    echo "the task is stored, but no worker could be started: no uv and no Python 3.11 was found" >&2
exit 0
