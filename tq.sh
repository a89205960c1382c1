#!/bin/sh
# The task queue's command: tq add, tq work, tq list ... hands over to the scripts.
# install.py copies this file to ~/.local/bin and fills in the four paths below. The plugin's bin/task-queue
# runs it as it stands, with an installation's scripts where there is one.
lib=
python=
uv=
state=
name=${0##*/}
if [ -z "$lib" ]; then
    name=task-queue here=${0%/*} asked=${TASK_QUEUE_STATE:-}
    # shellcheck source=places.sh disable=SC1091
    . "$here/places.sh"
    lib=${worker:-$here} state=$TASK_QUEUE_STATE TASK_QUEUE_STATE=$asked
    case $lib in /*) ;; *) lib=$PWD/$lib ;; esac
fi
export TASK_QUEUE_STATE="${TASK_QUEUE_STATE:-$state}"

usage() {
    cat <<END
usage: $name COMMAND [ARGUMENTS]

  add QUEUE TASK_TYPE [DATA]    put a task into a queue
  work QUEUE ...                run tasks
  list, show, logs, stats       see what waits, runs and failed, and why
  wait                          until tasks have ended; prints their results
  approve, reject               let a held task run, or end it
  retry, cancel, move, purge    act on tasks
  pause, resume, limit          hold a queue back
  doctor                        what is wrong, and what to do about it
  report                        what became of the tasks of this directory
  page                          all of it as an HTML page
  cleanup                       prune the history
  export, import                tasks as JSON lines
  backup, restore               the whole database
  relay                         have tasks run on another machine
  service                       start workers whenever there is work
  install, uninstall            put all this in place, or take it out

$name COMMAND --help says more, $name --version which version this is.
The scripts are in $lib.
END
}

# What a command is called that is not called like its script. A command that has no script is one of tasks.py.
case ${1:-} in
'' | -h | --help | help) usage; exit 0 ;;
--version) exec sed -n "s/^VERSION = \"\(.*\)\"\$/$name \1/p" "$lib/queue_helpers.py" ;;
add) script=enqueue ;;
work) script=worker ;;
*[!a-z]*) script= ;;
*) script=$1 ;;
esac
case $script in
install | uninstall) script=install ;;
*)
    if [ -n "$script" ] && [ -r "$lib/$script.py" ]; then
        shift
    elif [ -n "$script" ] && { usage && echo dashboard; } | grep -qwF "$script"; then
        script=tasks
    else
        echo "$name: there is no such command; see $name --help" >&2
        exit 64
    fi
    ;;
esac

if [ ! -r "$lib/$script.py" ]; then
    echo "$name: $lib/$script.py is gone; run just install again, or remove $0" >&2
    exit 1
fi
# Scripts without dependencies start faster without uv.
if [ -x "$uv" ] && ! { [ -x "$python" ] && grep -q '^# dependencies = \[\]$' "$lib/$script.py"; }; then
    unset PYTHONPATH PYTHONHOME PYTHONSAFEPATH VIRTUAL_ENV CONDA_PREFIX \
        UV_PYTHON UV_PROJECT UV_ENV_FILE UV_CONFIG_FILE UV_WORKING_DIR
    # uv runs the interpreter of a .venv in its working directory or above, which may be a workspace's.
    # The script goes back to where this was typed.
    export TASK_QUEUE_CWD="$PWD"
    cd / && exec "$uv" run --quiet --no-config --script "$lib/$script.py" "$@"
fi
if [ -x "$python" ]; then exec "$python" -E -s "$lib/$script.py" "$@"; fi
echo "$name: neither Python nor uv is where install found it; install uv, then run just install again" >&2
exit 1
