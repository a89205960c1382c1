"""A stand-in for the Messages API, on loopback: it answers as DIRECTORY/answer.json says, and keeps what it was asked.

usage: python api.py PORT DIRECTORY

answer.json is read again for each request, {"kind": …} with:

    fine       a short text, or the `text` given
    tool       the `commands` given, a Bash call each (or {name, input}), and the text after the last; with `then_hang` none instead
    limit      429 from the `after`-th conversation on, until `seconds` after the first such answer; then fine
    auth       401; with `first`, only so many times, then fine
    overload   529
    too_long   400, the prompt is too long
    no_model   404, no such model
    refusal    an answer that stops with a refusal
    nothing    an answer without content that stops for a tool_use
    credit     400, no credit
    broken     the connection is closed without an answer
    hang       no answer

With `tokens`, an answer says that the conversation has so many; `compacting` is the kind of answer to
a request that would make it shorter.

Each request for a model's answer is a line of requests.jsonl: its body, its time, and how it was answered.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, DIRECTORY = int(sys.argv[1]), Path(sys.argv[2])
LOCK = threading.Lock()


class Limit:
    """The account's limit: once reached, it holds for all until it resets."""

    asked = 0
    resets_at: float | None = None


def plan() -> dict:
    return json.loads((DIRECTORY / "answer.json").read_text())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, b"{}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self.path.startswith("/v1/messages") or "count_tokens" in self.path:
            return self.send(200, b'{"input_tokens": 1}')
        body = json.loads(raw or b"{}")
        answer = plan()
        kind = answer["kind"]
        if "compacting" in answer and "summary of the conversation" in json.dumps(body["messages"]):
            kind = answer["compacting"]
        if kind == "limit":
            kind = self.limited(body, answer)
        if "first" in answer:
            with LOCK:
                Limit.asked += 1
                kind = kind if Limit.asked <= answer["first"] else "fine"
        entry = {"time": time.time(), "kind": kind, "headers": dict(self.headers), "body": body}
        with LOCK, open(DIRECTORY / "requests.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        done = sum(map(has_tool_result, body["messages"]))
        if kind == "hang" or answer.get("then_hang") and done == len(answer["commands"]):
            while plan() == answer:
                time.sleep(0.02)
            # Whoever asked was killed meanwhile.
            self.close_connection = True
            return
        getattr(self, f"answer_{kind}", self.answer_fine)(body, answer)

    def limited(self, body: dict, answer: dict) -> str:
        with LOCK:
            if is_main(body):
                Limit.asked += 1
            if Limit.resets_at is None and Limit.asked >= answer.get("after", 1):
                Limit.resets_at = time.time() + answer["seconds"]
            return (
                "limit" if Limit.resets_at is not None and time.time() < Limit.resets_at else "fine"
            )

    # --------------------------------------------------------------------------------------------------- the answers

    def answer_auth(self, *_) -> None:
        self.error(401, "authentication_error", "invalid x-api-key")

    def answer_overload(self, *_) -> None:
        self.error(529, "overloaded_error", "Overloaded", [("x-should-retry", "false")])

    def answer_credit(self, *_) -> None:
        message = "Your credit balance is too low to access the Anthropic API."
        self.error(400, "invalid_request_error", message)

    def answer_too_long(self, *_) -> None:
        message = "prompt is too long: 250000 tokens > 200000 maximum"
        self.error(400, "invalid_request_error", message)

    def answer_no_model(self, body: dict, *_) -> None:
        self.error(404, "not_found_error", f"model: {body.get('model')}")

    def answer_refusal(self, body: dict, *_) -> None:
        self.message(body, [{"type": "text", "text": "I"}], "refusal")

    def answer_nothing(self, body: dict, *_) -> None:
        self.message(body, [], "tool_use")

    def answer_limit(self, body: dict, answer: dict) -> None:
        resets_at = int(Limit.resets_at) + 1
        left = resets_at - int(time.time())
        headers = [("retry-after", str(left))] if not answer.get("silent") else []
        if answer.get("unified", True):
            headers += [
                ("anthropic-ratelimit-unified-status", "rejected"),
                ("anthropic-ratelimit-unified-reset", str(resets_at)),
                ("anthropic-ratelimit-unified-representative-claim", "five_hour"),
            ]
        if not answer.get("may_retry"):
            headers.append(("x-should-retry", "false"))
        message = "This request would exceed your account's rate limit."
        self.error(429, "rate_limit_error", message, headers)

    def answer_broken(self, *_) -> None:
        self.close_connection = True
        self.connection.close()

    def answer_fine(self, body: dict, answer: dict) -> None:
        blocks = [{"type": "text", "text": answer.get("text", "Done.")}]
        if answer["kind"] == "tool" and is_main(body):
            done = sum(has_tool_result(message) for message in body["messages"])
            if done < len(answer["commands"]):
                command = answer["commands"][done]
                call = {"command": command, "description": "a step"}
                tool = command if isinstance(command, dict) else {"name": "Bash", "input": call}
                blocks = [{"type": "tool_use", "id": f"toolu_{done}", **tool}]
        self.message(body, blocks, tokens=answer.get("tokens", 3))

    # ------------------------------------------------------------------------------------------------------ sending

    def error(self, code: int, kind: str, message: str, headers=()) -> None:
        self.send(
            code,
            json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode(),
            headers,
        )

    def message(self, body: dict, blocks: list[dict], reason: str = "", tokens: int = 3) -> None:
        last = blocks[-1]["type"] if blocks else None
        reason = reason or ("tool_use" if last == "tool_use" else "end_turn")
        message = {
            "id": f"msg_{time.time_ns()}",
            "type": "message",
            "role": "assistant",
            "model": body.get("model", "m"),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": tokens, "output_tokens": 1},
        }
        if not body.get("stream"):
            message |= {"content": blocks, "stop_reason": reason}
            return self.send(200, json.dumps(message).encode())
        events = [{"type": "message_start", "message": message}]
        for number, block in enumerate(blocks):
            empty = block | ({"text": ""} if block["type"] == "text" else {"input": {}})
            if block["type"] == "text":
                delta = {"type": "text_delta", "text": block["text"]}
            else:
                delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            events += [
                {"type": "content_block_start", "index": number, "content_block": empty},
                {"type": "content_block_delta", "index": number, "delta": delta},
                {"type": "content_block_stop", "index": number},
            ]
        end = {"stop_reason": reason, "stop_sequence": None}
        events += [
            {"type": "message_delta", "delta": end, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        ]
        text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        self.send(200, text.encode(), [("content-type", "text/event-stream")])

    def send(self, code: int, raw: bytes, headers=()) -> None:
        self.send_response(code)
        names = {name for name, _ in headers}
        if "content-type" not in names:
            self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


def is_main(body: dict) -> bool:
    """Whether a request is the session's own: those have tools, Claude Code's side questions have none."""
    return bool(body.get("tools"))


def has_tool_result(message: dict) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        block.get("type") == "tool_result" for block in content
    )


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    # Written last: whoever waits for it finds us listening.
    (DIRECTORY / "api.pid").write_text(str(os.getpid()))
    server.serve_forever()
