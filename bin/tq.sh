#!/bin/sh
# The task queue's command: tq add, tq work, tq list ... hands over to the scripts.
# install.py copies this file to PREFIX/runtime/tq and ~/.local/bin, and fills in the four paths
# below. The plugin's bin/task-queue runs it as it stands; an installation's tq goes first.
lib=
python=
uv=
state=
name=${0##*/}
if [ -z "$lib" ]; then
    name=task-queue installed=${HOME:-}/.claude/automation/lychee/runtime/tq
    if [ -r "$installed" ]; then exec /bin/sh "$installed" "$@"; fi
    lib=$(cd "${0%/*}/.." && pwd -P) || exit 1
    # A name with a version needs no start to see whether it is new enough.
    for place in "${HOME:-}/.local/bin" /usr/local/bin /opt/homebrew/bin /usr/bin; do
        for version in 3.14 3.13 3.12 3.11; do
            [ -x "$python" ] || python=$place/python$version
        done
    done
    [ -x "$python" ] || python=
    for place in "${HOME:-}/.local/bin" "${HOME:-}/.cargo/bin" /opt/homebrew/bin /usr/local/bin /usr/bin; do
        [ -x "$uv" ] || uv=$place/uv
    done
fi
if [ -n "${TASK_QUEUE_STATE:-$state}" ]; then export TASK_QUEUE_STATE="${TASK_QUEUE_STATE:-$state}"; fi
usage() {
    cat <<END
usage: $name COMMAND [ARGUMENTS]

  add QUEUE TASK_TYPE [DATA]    put a task into a queue
  run -- COMMAND ...            put a command into a queue
  work QUEUE ...                run tasks
  list, show, logs, stats       show what waits, runs and failed, and why
  every                         have a task come again and again
  wait                          wait until tasks have ended; print their results
  approve, reject               let a held task run, or end it
  ask                           go through the held tasks, and answer for each
  retry, cancel, move, edit     act on tasks
  purge, drop                   delete tasks; remove an empty queue
  pause, resume, limit          hold a queue back
  notify                        show or test the command that tells you at once
  take-in                       make tasks of the files that hooks left
  doctor                        say what is wrong, and what mends it
  report                        say what became of this directory's tasks
  page                          write the queue as an HTML page
  cleanup                       prune the history
  export, import                copy tasks as JSON lines
  backup, restore               copy the whole database
  relay                         run tasks on another machine
  completion                    print a completion script for your shell
  service                       start workers whenever there is work
  install, uninstall            put all this in place, or remove it

$name help COMMAND says more, $name --version which version this is.
The scripts are in $lib.
END
}

# add and work have scripts of other names. A command without a script is one of tasks.py, which knows
# what is near to a mistyped one.
if [ "${1:-}" = help ] && [ $# -gt 1 ]; then set -- "$2" --help; fi
case ${1:-} in
'' | -h | --help | help) usage; exit 0 ;;
-V | --version | version) exec sed -n "s/^VERSION = \"\(.*\)\"\$/$name \1/p" "$lib/queue_helpers.py" ;;
complete)
    # A shell waits for it at each Tab.
    shift
    exec "${python:-python3}" -I -S "$lib/taskqueue/complete.py" "$@"
    ;;
add) script=enqueue ;;
run) script=enqueue; shift; set -- run --run "$@" ;;
work) script=worker ;;
cleanup | demo | relay | report) script=$1 ;;
install | uninstall) script=install ;;
*) script=tasks ;;
esac
case $script in tasks | install) ;; *) shift ;; esac

if [ ! -r "$lib/$script.py" ]; then
    echo "$name: $lib/$script.py is gone; run just install again, or remove $0" >&2
    exit 1
fi
# Scripts without dependencies start faster without uv, and doctor must run where uv does not.
needs_uv=yes
case "$script ${1:-}" in "tasks doctor" | "tasks completion") needs_uv= ;; esac
if grep -q '^# dependencies = \[\]$' "$lib/$script.py"; then needs_uv=; fi
if [ -x "$uv" ] && { [ -n "$needs_uv" ] || [ ! -x "$python" ]; }; then
    # With an absolute Python, uv runs none that lies in the working directory or above, which may be a
    # workspace's; and no uv.toml there has a say.
    if [ -n "$python" ]; then export UV_PYTHON="$python"; fi
    # A worker stays for long: uv makes its environment, and does not stay with it.
    if [ "$script" = worker ]; then
        "$uv" sync --quiet --no-config --script "$lib/worker.py" || exit
        python=$("$uv" python find --no-config --script "$lib/worker.py")
        if [ -x "$python" ]; then exec "$python" -E -s "$lib/worker.py" "$@"; fi
    fi
    exec "$uv" run --quiet --no-config --script "$lib/$script.py" "$@"
fi
if [ -x "$python" ]; then exec "$python" -E -s "$lib/$script.py" "$@"; fi
echo "$name: neither Python nor uv is where install found it; install uv, then run just install again" >&2
exit 1
