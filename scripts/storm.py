#!/usr/bin/env python3
"""What scripts/soak's part `audit` needs: a target, a load, a scanner, a slow collector, and the check of what was recorded.

  storm.py serve FILE                      an echo server; FILE gets the time of every connection; prints its address first
  storm.py load ADDRESS COUNT SECONDS      forwards until COUNT of them have carried something, or the time is over
  storm.py scan ADDRESS SECONDS            connections that never log in, one after the other
  storm.py slow BYTES                      takes so many bytes a second from whoever connects; prints its address first
  storm.py check FILE GATEWAY AGENT        holds the trails to their chains, to each other, and to the target's connections
"""

import base64
import glob
import hashlib
import json
import re
import socket
import sys
import threading
import time
from datetime import datetime


def address(text):
    host, port = text.rsplit(":", 1)
    return host, int(port)


def listen():
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print("127.0.0.1:%d" % listener.getsockname()[1], flush=True)
    return listener


def serve(path):
    log, lock = open(path, "a", buffering=1), threading.Lock()

    def echo(stream):
        with stream:
            try:
                while data := stream.recv(65536):
                    stream.sendall(data)
            except OSError:
                pass

    listener = listen()
    while True:
        stream, _ = listener.accept()
        with lock:
            log.write("%d\n" % int(time.time() * 1000))
        threading.Thread(target=echo, args=(stream,), daemon=True).start()


def load(to, count, seconds):
    until, lock, done = time.monotonic() + seconds, threading.Lock(), {"carried": 0, "refused": 0}

    def work(token):
        while time.monotonic() < until:
            with lock:
                if done["carried"] >= count:
                    return
            try:
                with socket.create_connection(to, timeout=20) as stream:
                    stream.sendall(token)
                    got = b""
                    while len(got) < len(token):
                        data = stream.recv(64)
                        if not data:
                            raise OSError("cut")
                        got += data
                    assert got == token, "another's bytes"
                result = "carried"
            except OSError:
                result = "refused"
                time.sleep(0.02)
            with lock:
                done[result] += 1

    threads = [threading.Thread(target=work, args=(b"%016d" % each,)) for each in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("%(carried)d %(refused)d" % done)


def scan(to, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with socket.create_connection(to, timeout=5) as stream:
                stream.sendall(b"GET / HTTP/1.0\r\n\r\n")
        except OSError:
            time.sleep(0.05)


def slow(bytes_a_second):
    def take(stream):
        with stream:
            while stream.recv(bytes_a_second // 10):
                time.sleep(0.1)

    listener = listen()
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=take, args=(stream,), daemon=True).start()


def files(path):
    rotated = [name for name in glob.glob(glob.escape(path) + ".*") if re.search(r"\.\d{8}T\d{6}Z-\d{12,}$", name)]
    return sorted(rotated, key=lambda name: int(name.rsplit("-", 1)[1])) + [path]


def moment(text):
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000


def digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


LINK = re.compile(rb',"seq":(0|[1-9]\d*),"prev":"([\w-]{43})"}\n$')


def trail(path):
    """The records of a trail, and what is wrong with it: it is one unbroken chain from its very first record, in however many
    files, each of which begins as a file does."""
    records, faults, torn, before = [], [], [], None
    for name in files(path):
        first = True
        for line in open(name, "rb"):
            link = LINK.search(line)
            if not link:
                torn.append(digest(line.rstrip(b"\n")))
                continue
            seq, prev = int(link[1]), link[2].decode()
            record = json.loads(line)
            if before is None:
                # Nothing was before the storm: the first one names the trail itself, and says that it begins.
                origin = digest(("caponier-trail-1:%s" % record.get("trail")).encode())
                if (seq, prev) != (0, origin):
                    faults.append("%s: record %d, the first one, is not what a trail begins with" % (name, seq))
                if record["event"] != "trail.started":
                    faults.append("%s: begins with %s" % (name, record["event"]))
            elif (seq, prev) != (before[0] + 1, before[1]):
                faults.append("%s: %d follows %d, and does not name it" % (name, seq, before[0]))
            elif first and record["event"] not in ("trail.started", "trail.continued"):
                faults.append("%s: a file begins with %s" % (name, record["event"]))
            first = False
            before = seq, digest(line)
            records.append(record)
            if record.get("torn") in torn:
                torn.remove(record["torn"])
    return records, faults + ["torn and not named: " + each for each in torn]


def check(accepts, gateway, agent):
    result = {"faults": [], "records": 0, "opened": {}}
    opens = {}
    for side, path in (("gateway", gateway), ("agent", agent)):
        records, faults = trail(path)
        result["faults"] += faults
        result["records"] += len(records)
        state = opens[side] = {}
        for record in records:
            forward, event = record.get("forward"), record["event"]
            if event == "forward.open":
                if forward in state:
                    result["faults"].append("%s: %s was opened twice" % (side, forward))
                state[forward] = [record, None]
            elif forward in state and event in ("forward.denied", "forward.failed", "forward.ended", "forward.abandoned"):
                if state[forward][1]:
                    ends = ["%s %s (%d)" % (it["event"], it.get("reason"), it["seq"]) for it in (state[forward][1], record)]
                    result["faults"].append("%s: %s has two ends: %s" % (side, forward, " and ".join(ends)))
                state[forward][1] = record
        never = [forward for forward, (_, end) in state.items() if not end]
        if never:
            result["faults"].append("%s: %d never ended" % (side, len(never)))
        result["opened"][side] = len(state)
        result["recovered_" + side] = sum(record["event"] == "trail.recovered" for record in records)
        result["resumed_" + side] = sum(record["event"] == "trail.resumed" for record in records)
        result["sinks_" + side] = sum(record["event"] == "sink.works" for record in records)
    # What the agent opened, the gateway had opened before; what both ended, they counted alike.
    for opening, end in opens["agent"].values():
        other = opens["gateway"].get(opening.get("peer_forward"))
        if not other:
            result["faults"].append("the gateway has no opening of %s" % opening.get("peer_forward"))
        elif end and other[1] and end["event"] == other[1]["event"] == "forward.ended" and end["reason"] == "eof":
            if (end["to_target"], end["from_target"]) != (other[1]["to_target"], other[1]["from_target"]):
                result["faults"].append("%s: the two sides counted differently" % opening["forward"])
    # The connection number N was not made before the opening number N was written.
    times = sorted(moment(opening["time"]) for opening, _ in opens["agent"].values())
    connections = sorted(int(line) for line in open(accepts))
    result["connections"] = len(connections)
    if len(connections) > len(times):
        result["faults"].append("%d connections, and %d openings" % (len(connections), len(times)))
    early = sum(at + 1 < opened for at, opened in zip(connections, times))
    if early:
        result["faults"].append("%d connections came before their openings" % early)
    result["count"] = len(result["faults"])
    result["faults"] = result["faults"][:10]
    print(json.dumps(result))


def main():
    mode, rest = sys.argv[1], sys.argv[2:]
    if mode == "serve":
        serve(rest[0])
    elif mode == "load":
        load(address(rest[0]), int(rest[1]), float(rest[2]))
    elif mode == "scan":
        scan(address(rest[0]), float(rest[1]))
    elif mode == "slow":
        slow(int(rest[0]))
    elif mode == "check":
        check(*rest)
    else:
        sys.exit(__doc__)


main()
