"""persist-queue's own tests of its two SQLite classes, run on ours; each difference has its reason.

Our queues hold JSON objects, so an adapter packs each item of those tests into one.
"""

from __future__ import annotations

import base64
import json
import pickle
from unittest import mock

import pytest

persistqueue = pytest.importorskip("persistqueue")
ack_tests = pytest.importorskip("persistqueue.tests.test_sqlackqueue")
queue_tests = pytest.importorskip("persistqueue.tests.test_sqlqueue")

from taskqueue.persist import SQLiteAckQueue, SQLiteQueue  # noqa: E402

pytestmark = pytest.mark.once
PROTOCOL = "our tables hold JSON text, so there is no pickle protocol"
DIFFERENCES = {
    "SQLiteAckQueue": {
        "test_protocol_1": PROTOCOL,
        "test_protocol_2": PROTOCOL,
        "test_resume_unack": "a living process keeps its tasks; those of a dead one come back by themselves",
    },
    "SQLiteQueue": {
        "test_protocol_1": PROTOCOL,
        "test_protocol_2": PROTOCOL,
        "test_task_done_with_restart": "get() has finished the task; task_done() has nothing left to do",
    },
}


def packed(item: object) -> dict:
    return {"item": base64.b64encode(pickle.dumps(item)).decode()}


def unpacked(text: str) -> object:
    return pickle.loads(base64.b64decode(json.loads(text)["item"]))


class Adapted:
    """Packs what goes in, unpacks what comes out, and knows the row of each item that is out."""

    def __init__(self, path=None, **options) -> None:
        super().__init__(path, backoff=0.0, **options)
        self.out: list[tuple[int, object]] = []

    def put(self, item, block=True):
        return super().put(packed(item), block)

    def get(self, *args, raw=False, **how):
        got = super().get(*args, raw=raw, **how)
        if raw:
            return {**got, "data": unpacked(got["data"])}
        row, text = got if isinstance(got, tuple) else (0, got)
        self.out.append((row, unpacked(text)))
        return self.out[-1][1]

    def queue(self):
        return [{**each, "data": unpacked(each["data"])} for each in super().queue()]

    def update(self, item, id=None):
        return super().update(packed(item), id)

    def row_of(self, item):
        if isinstance(item, dict):
            return item["pqid"]
        return next((row for row, each in reversed(self.out) if each == item), 0)


class AdaptedQueue(Adapted, SQLiteQueue):
    pass


class AdaptedAckQueue(Adapted, SQLiteAckQueue):
    def ack(self, item=None, id=None):
        return super().ack(id=self.row_of(item))

    def nack(self, item=None, id=None):
        return super().nack(id=self.row_of(item))

    def ack_failed(self, item=None, id=None):
        return super().ack_failed(id=self.row_of(item))


def suite(theirs, ours):
    """Return their test case with our class, and its known differences marked."""

    class Suite(theirs):
        def setUp(self) -> None:
            super().setUp()
            self.queue_class = ours
            # Some of them take the class from their module.
            name = ours.__mro__[2].__name__
            patch = mock.patch.dict(theirs.setUp.__globals__, {name: ours})
            patch.start()
            self.addCleanup(patch.stop)

    for name, reason in DIFFERENCES[ours.__mro__[2].__name__].items():

        def differs(self, name=name):
            return getattr(theirs, name)(self)

        setattr(Suite, name, pytest.mark.xfail(strict=True, reason=reason)(differs))
    return Suite


TestSQLiteQueue = suite(queue_tests.SQLite3QueueTest, AdaptedQueue)
TestSQLiteAckQueue = suite(ack_tests.SQLite3AckQueueTest, AdaptedAckQueue)
del ack_tests, queue_tests
