#!/bin/sh
# Tell you at once what a worker has to say. A worker runs it, as: worker.py … --notify handlers/notify.sh
# stdin is JSON: [{"event": "failed", "queue": …, "task_id": …, "error": …}, …]; TASK_QUEUE_TEXT is the
# same in lines for a person. With NTFY_TOPIC in the environment, your phone hears it, too: https://ntfy.sh
code=1
if command -v notify-send >/dev/null; then
    notify-send -- "Task queue" "$TASK_QUEUE_TEXT" && code=0
elif command -v osascript >/dev/null; then
    osascript -e 'on run words' -e 'display notification (item 1 of words) with title "Task queue"' -e 'end run' "$TASK_QUEUE_TEXT" && code=0
fi
if [ -n "${NTFY_TOPIC:-}" ]; then
    printf %s "$TASK_QUEUE_TEXT" | curl -fsS -m 20 -H "Title: Task queue" --data-binary @- "${NTFY_SERVER:-https://ntfy.sh}/$NTFY_TOPIC" >/dev/null && code=0
fi
exit $code
