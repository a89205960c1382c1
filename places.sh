# shellcheck shell=sh disable=SC2034
# Where Python, uv and the state are, for a copy of hook.sh or tq.sh whose paths nobody filled in: that
# of the plugin, or of a checkout. An installation's are taken where there is one. These two files read
# this one; nothing is remembered, since a plugin's directory is another one after each update.
case ${HOME:-} in
/*) ;;
*)
    echo "HOME is not absolute: there is no place for the task queue" >&2
    exit 1 ;;
esac
prefix=$HOME/.claude/automation/lychee
TASK_QUEUE_STATE=$prefix/state
worker=
if [ -r "$prefix/runtime/hook" ] && [ -r "$prefix/runtime/lib/worker.py" ]; then
    worker=$prefix/runtime/lib
    # install.py quoted these lines for a shell.
    while IFS= read -r line; do
        case $line in
        python=* | uv=* | TASK_QUEUE_STATE=*) eval "$line" ;;
        'exec '*) break ;;
        esac
    done <"$prefix/runtime/hook"
fi
# A name with a version needs no start to see whether it is new enough.
for place in "$HOME/.local/bin" /usr/local/bin /opt/homebrew/bin /usr/bin; do
    for name in python3.14 python3.13 python3.12 python3.11; do
        [ -x "$python" ] || python=$place/$name
    done
done
for place in "$HOME/.local/bin" "$HOME/.cargo/bin" /opt/homebrew/bin /usr/local/bin /usr/bin; do
    [ -x "$uv" ] || uv=$place/uv
done
[ -x "$uv" ] || uv=
