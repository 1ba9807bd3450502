"""As much of a Kubernetes API server as kubectl needs: version, discovery, config maps, and one pod called web.

    kube.py FOLDER ADDRESS:PORT [plain]

Serves TLS with FOLDER/server.pem and server.key, to whoever shows a client certificate of FOLDER/ca.pem or the bearer token
in FOLDER/token. If told so, it serves plain HTTP, to everybody: that is for a control, and kubectl says no token in clear.
It says where it listens, and of each request who asked for what; nothing that is secret. The requests:

* GET, POST, PATCH (as a JSON merge), DELETE, list and watch of config maps;
* `log` of the pod: FOLDER/web.log; one that follows sees what is appended to it;
* `exec` in the pod: runs the command here; over SPDY/3.1 or WebSocket (v5.channel.k8s.io), as kubectl's age has it;
* `portforward` of the pod: connects to that port here; over SPDY/3.1, itself perhaps in a WebSocket.

The last three answer also at the paths that a kubelet has for them, where a real API server asks its node. Python's own
library is all it needs.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import ssl
import struct
import sys
import uuid
import zlib
from urllib.parse import parse_qs, unquote, urlsplit

# The dictionary of the SPDY/3 draft for headers: it begins with these words, each after its length.
WORDS = """options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow
authorization cache-control connection content-base content-encoding content-language content-length content-location
content-md5 content-range content-type date etag expect expires from host if-match if-modified-since if-none-match if-range
if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer
retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get status
200_OK version HTTP/1.1 url public set-cookie keep-alive origin"""
REST = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative "
    "Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal "
    "Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, "
    "Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,"
    "application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8"
    "charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(it)) + it.replace("_", " ").encode() for it in WORDS.split()) + REST.encode()
assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2

# Nothing that kubectl sends here is larger.
BODY_MAX = 4 * 1024 * 1024
CHUNK = 16 * 1024


class Gone(Exception):
    """The client has left, or says what makes no sense."""


# --- SPDY/3.1 and WebSocket ------------------------------------------------------------------------------------------


class Raw:
    """The bytes of a connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def read(self, count):
        return await self.reader.readexactly(count)

    async def write(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def close(self):
        self.writer.close()


class WebSocket:
    """Messages, each in one frame as gorilla's library writes them; `read` takes them for one row of bytes."""

    def __init__(self, raw):
        self.raw, self.rest = raw, b""

    async def receive(self):
        while True:
            first, second = await self.raw.read(2)
            length = second & 0x7F
            if length >= 126:
                length = int.from_bytes(await self.raw.read(2 if length == 126 else 8), "big")
            if length > BODY_MAX or not second & 0x80:
                raise Gone(f"a frame of {length} bytes, or one without a mask")
            mask = await self.raw.read(4)
            data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(await self.raw.read(length)))
            kind = first & 0x0F
            if kind == 9:
                await self.send(data, 0x8A)
            elif kind == 8:
                raise Gone("the WebSocket was closed")
            elif kind != 10:
                return data

    async def send(self, data, first=0x82):
        length = len(data)
        size = bytes([length]) if length < 126 else b"\x7e" + struct.pack(">H", length)
        await self.raw.write(bytes([first]) + (size if length < 1 << 16 else b"\x7f" + struct.pack(">Q", length)) + data)

    async def read(self, count):
        while len(self.rest) < count:
            self.rest += await self.receive()
        data, self.rest = self.rest[:count], self.rest[count:]
        return data

    async def write(self, data):
        for at in range(0, len(data), CHUNK):
            await self.send(data[at : at + CHUNK])

    async def close(self):
        await self.send(struct.pack(">H", 1000), 0x88)
        await self.raw.close()


class Stream:
    """One stream of a SPDY session; the client has made it."""

    def __init__(self, session, number, headers):
        self.session, self.number, self.headers = session, number, headers
        self.received = asyncio.Queue(64)

    async def read(self):
        """What came, or nothing at its end."""
        data = await self.received.get()
        return data or b""

    async def write(self, data, end=False):
        for at in range(0, max(len(data), 1), CHUNK):
            part = data[at : at + CHUNK]
            flags = 0x01 if end and at + CHUNK >= len(data) else 0
            await self.session.transport.write(struct.pack(">II", self.number, flags << 24 | len(part)) + part)


class Spdy:
    def __init__(self, transport):
        self.transport, self.streams, self.made = transport, {}, asyncio.Queue(64)
        self.inflate, self.deflate = zlib.decompressobj(zdict=DICTIONARY), zlib.compressobj(zdict=DICTIONARY)

    async def run(self):
        """Reads until the client has left."""
        try:
            while True:
                first, second = struct.unpack(">II", await self.transport.read(8))
                flags, data = second >> 24, await self.transport.read(second & 0xFFFFFF)
                if first >> 31:
                    await self.control(first & 0xFFFF, flags, data)
                elif (stream := self.streams.get(first)) is not None:
                    if data:
                        await stream.received.put(data)
                    if flags & 0x01:
                        await stream.received.put(b"")
        finally:
            self.made.put_nowait(None) if not self.made.full() else None

    async def control(self, kind, flags, data):
        if kind == 1:  # SYN_STREAM
            number = int.from_bytes(data[:4], "big")
            stream = self.streams[number] = Stream(self, number, self.headers(data[10:]))
            await self.send(2, struct.pack(">I", number) + self.block({}))
            if flags & 0x01:
                await stream.received.put(b"")
            await self.made.put(stream)
        elif kind == 3:  # RST_STREAM
            if (stream := self.streams.pop(int.from_bytes(data[:4], "big"), None)) is not None:
                await stream.received.put(b"")
        elif kind == 6:  # PING
            await self.send(6, data)
        elif kind == 7:  # GOAWAY
            raise Gone("the client says that it goes")

    async def send(self, kind, data):
        await self.transport.write(struct.pack(">HHI", 0x8003, kind, len(data)) + data)

    def headers(self, block):
        block = self.inflate.decompress(block)
        count, at, words = int.from_bytes(block[:4], "big"), 4, []
        for _ in range(2 * count):
            length = int.from_bytes(block[at : at + 4], "big")
            words.append(block[at + 4 : at + 4 + length].decode())
            at += 4 + length
        return dict(zip(words[::2], words[1::2]))

    def block(self, headers):
        plain = struct.pack(">I", len(headers))
        for word in itertools.chain.from_iterable(headers.items()):
            plain += struct.pack(">I", len(word)) + word.encode()
        return self.deflate.compress(plain) + self.deflate.flush(zlib.Z_SYNC_FLUSH)

    async def accept(self):
        stream = await self.made.get()
        if stream is None:
            raise Gone("the session has ended")
        return stream


# --- the pod -----------------------------------------------------------------------------------------------------------


class SpdyTerminal:
    """The streams of `exec`, each a stream of SPDY."""

    def __init__(self, session):
        self.session, self.streams = session, {}

    async def start(self, names):
        while not names <= self.streams.keys():
            stream = await self.session.accept()
            self.streams[stream.headers["streamtype"]] = stream

    async def input(self):
        return await self.streams["stdin"].read()

    async def write(self, name, data, end=False):
        await self.streams[name].write(data, end)


class SocketTerminal:
    """The streams of `exec`, told apart by the first byte of each message."""

    NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2, "error": 3}

    def __init__(self, socket):
        self.socket, self.typed = socket, asyncio.Queue(64)

    async def run(self):
        while True:
            message = await self.socket.receive()
            if message[:1] == b"\x00" and len(message) > 1:
                await self.typed.put(message[1:])
            elif message == b"\xff\x00":
                await self.typed.put(b"")

    async def start(self, names):
        pass

    async def input(self):
        return await self.typed.get()

    async def write(self, name, data, end=False):
        if data:
            await self.socket.send(bytes([self.NUMBERS[name]]) + data)


async def execute(terminal, command, wanted):
    """Runs a command in the pod, which is here."""
    await terminal.start(wanted | {"error"})
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe if "stdin" in wanted else none, stdout=pipe, stderr=pipe)

    async def feed():
        while data := await terminal.input():
            process.stdin.write(data)
            await process.stdin.drain()
        process.stdin.close()

    async def tell(name, source):
        while data := await source.read(CHUNK):
            if name in wanted:
                await terminal.write(name, data)

    feeding = asyncio.create_task(feed()) if "stdin" in wanted else None
    try:
        await asyncio.gather(tell("stdout", process.stdout), tell("stderr", process.stderr))
        code = await process.wait()
        status = {"metadata": {}, "status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            status.update(status="Failure", reason="NonZeroExitCode", details={"causes": causes})
            status.update(message=f"command terminated with exit code {code}")
        await terminal.write("error", json.dumps(status).encode(), end=True)
        for name in wanted - {"stdin"}:
            await terminal.write(name, b"", end=True)
    finally:
        if feeding:
            feeding.cancel()
        if process.returncode is None:
            process.kill()


async def forward_ports(session):
    """Each connection is two streams with one request id, of which `data` carries it."""

    async def one(data, error):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(data.headers["port"]))
        except OSError as failure:
            await error.write(f"the pod: {failure}".encode(), end=True)
            await data.write(b"", end=True)
            return

        async def there():
            while read := await data.read():
                writer.write(read)
                await writer.drain()
            writer.write_eof()

        async def back():
            while read := await reader.read(CHUNK):
                await data.write(read)
            await data.write(b"", end=True)
            await error.write(b"", end=True)

        try:
            await asyncio.gather(there(), back())
        finally:
            writer.close()

    errors, running = {}, set()
    while True:
        stream = await session.accept()
        request = stream.headers["requestid"]
        if stream.headers["streamtype"] == "error":
            errors[request] = stream
        else:
            running.add(asyncio.create_task(one(stream, errors[request])))


# --- objects -----------------------------------------------------------------------------------------------------------

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web", "namespace": "default", "uid": str(uuid.uuid4()), "resourceVersion": "1"},
    "spec": {"containers": [{"name": "web", "image": "web"}], "nodeName": "node"},
    "status": {"phase": "Running", "containerStatuses": [{"name": "web", "ready": True, "state": {"running": {}}}]},
}


def resource(name, kind, *verbs):
    return {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": list(verbs)}


RESOURCES = [
    resource("configmaps", "ConfigMap", "create", "delete", "get", "list", "patch", "watch") | {"shortNames": ["cm"]},
    resource("pods", "Pod", "get", "list"),
    resource("pods/log", "Pod", "get"),
    resource("pods/exec", "PodExecOptions", "create", "get"),
    resource("pods/portforward", "PodPortForwardOptions", "create", "get"),
]


class Refused(Exception):
    def __init__(self, code, reason, message):
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        self.status.update(reason=reason, message=message, code=code)


class Maps:
    """The config maps, and all that has happened to them."""

    def __init__(self):
        self.objects, self.events, self.happened = {}, [], asyncio.Condition()

    def version(self):
        return str(len(self.events) + 1)

    def find(self, name):
        if name not in self.objects:
            raise Refused(404, "NotFound", f'configmaps "{name}" not found')
        return self.objects[name]

    async def put(self, kind, found):
        name = found["metadata"]["name"]
        if kind == "ADDED" and name in self.objects:
            raise Refused(409, "AlreadyExists", f'configmaps "{name}" already exists')
        found["metadata"].setdefault("uid", str(uuid.uuid4()))
        found["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        found["metadata"].update(namespace="default", resourceVersion=str(len(self.events) + 2))
        async with self.happened:
            self.objects[name] = found
            if kind == "DELETED":
                del self.objects[name]
            self.events.append({"type": kind, "object": found})
            self.happened.notify_all()
        return found

    async def watch(self, version, wanted):
        """Every event after that version, for ever."""
        at = max(int(version or self.version()) - 1, 0)
        while True:
            async with self.happened:
                await self.happened.wait_for(lambda: len(self.events) > at)
            event = self.events[at]
            at += 1
            if wanted(event["object"]):
                yield event


def merge(old, patch):
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def selector(query):
    """What `fieldSelector=metadata.name=NAME` holds for."""
    name = dict(it.split("=", 1) for it in query.get("fieldSelector", "").split(",") if "=" in it).get("metadata.name")
    return lambda found: name in (None, found["metadata"]["name"])


# --- HTTP --------------------------------------------------------------------------------------------------------------


class Request:
    def __init__(self, method, target, headers, body):
        url = urlsplit(target)
        self.method, self.headers, self.body = method, headers, body
        self.path, self.query = [unquote(it) for it in url.path.split("/")[1:]], parse_qs(url.query)

    def one(self):
        return {name: values[0] for name, values in self.query.items()}

    def says(self, *names):
        """Whether one of these parameters is true; an API server says `true`, a kubelet `1`."""
        return any(self.query.get(name, [""])[0] in ("true", "1") for name in names)

    def upgrade(self):
        return self.headers.get("upgrade", "").lower()


class Server:
    def __init__(self, folder, plain):
        self.folder, self.plain, self.maps = folder, plain, Maps()

    async def connection(self, reader, writer):
        try:
            while (request := await self.request(reader)) is not None:
                await self.answer(request, reader, writer)
        except (Gone, OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def request(self, reader):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines[:-2]:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            headers[name] = f"{headers[name]},{value.strip()}" if name in headers else value.strip()
        length = int(headers.get("content-length", "0"))
        if length > BODY_MAX or "transfer-encoding" in headers:
            raise Gone("a body of no known or of too great a length")
        return Request(method, target, headers, await reader.readexactly(length))

    def user(self, request, writer):
        """Who asks: by certificate, or by token."""
        if self.plain:
            return "anybody"
        certificate = writer.get_extra_info("peercert")
        if certificate:
            return dict(it[0] for it in certificate["subject"])["commonName"]
        with open(os.path.join(self.folder, "token"), encoding="ascii") as file:
            if request.headers.get("authorization") == f"Bearer {file.read().strip()}":
                return "token"
        raise Refused(401, "Unauthorized", "Unauthorized")

    async def answer(self, request, reader, writer):
        try:
            user = self.user(request, writer)
            print(user, request.method, "/" + "/".join(request.path), request.upgrade(), flush=True)
            await self.route(request, reader, writer)
        except Refused as refused:
            await self.json(writer, refused.status, refused.code)

    async def json(self, writer, value, code=200):
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {code} Answer\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await Raw(None, writer).write(head.encode() + body)

    async def chunks(self, writer, kind, parts):
        raw = Raw(None, writer)
        await raw.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        async for part in parts:
            await raw.write(b"%x\r\n%s\r\n" % (len(part), part))
        await raw.write(b"0\r\n\r\n")

    async def route(self, request, reader, writer):
        match [request.method, *request.path]:
            case ["GET", "version"]:
                version = {"major": "1", "minor": "33", "gitVersion": "v1.33.0-standin", "platform": "linux/amd64"}
                await self.json(writer, version)
            case ["GET", "api"]:
                await self.json(writer, {"kind": "APIVersions", "versions": ["v1"]})
            case ["GET", "apis"]:
                await self.json(writer, {"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
            case ["GET", "api", "v1"]:
                found = {"kind": "APIResourceList", "groupVersion": "v1", "resources": RESOURCES}
                await self.json(writer, found)
            case [method, "api", "v1", "namespaces", "default", "configmaps", *name]:
                await self.config_maps(method, name, request, writer)
            case ["GET", "api", "v1", "namespaces", "default", "pods"]:
                await self.json(writer, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [POD]})
            case ["GET", "api", "v1", "namespaces", "default", "pods", "web"]:
                await self.json(writer, POD)
            case ["GET", "api", "v1", "namespaces", "default", "pods", "web", "log"] | ["GET", "containerLogs", *_]:
                await self.chunks(writer, "text/plain", self.log(request.says("follow"), writer))
            case [_, "api", "v1", "namespaces", "default", "pods", "web", "exec"] | [_, "exec", *_]:
                await self.exec(request, Raw(reader, writer))
            case [_, "api", "v1", "namespaces", "default", "pods", "web", "portforward"] | [_, "portForward", *_]:
                await self.port_forward(request, Raw(reader, writer))
            case _:
                raise Refused(404, "NotFound", "the server could not find the requested resource")

    async def config_maps(self, method, name, request, writer):
        match method, name:
            case "GET", [] if request.says("watch"):
                events = self.maps.watch(request.one().get("resourceVersion"), selector(request.one()))
                lines = (json.dumps(event).encode() + b"\n" async for event in events)
                await self.chunks(writer, "application/json", lines)
            case "GET", []:
                wanted = selector(request.one())
                found = {"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": self.maps.version()}}
                found["items"] = [it for it in self.maps.objects.values() if wanted(it)]
                await self.json(writer, found)
            case "POST", []:
                await self.json(writer, await self.maps.put("ADDED", json.loads(request.body)), 201)
            case "GET", [name]:
                await self.json(writer, self.maps.find(name))
            case "PATCH", [name]:
                merged = merge(self.maps.find(name), json.loads(request.body))
                await self.json(writer, await self.maps.put("MODIFIED", merged))
            case "DELETE", [name]:
                await self.json(writer, await self.maps.put("DELETED", self.maps.find(name)))
            case _:
                raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    async def log(self, follow, writer):
        with open(os.path.join(self.folder, "web.log"), "rb") as file:
            while True:
                if data := file.read(CHUNK):
                    yield data
                elif not follow or writer.is_closing():
                    return
                else:
                    # A file tells nobody when it grows.
                    await asyncio.sleep(0.02)

    async def switch(self, raw, headers):
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        await raw.write(f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n{lines}\r\n".encode())

    async def socket(self, request, raw, protocol):
        """Switches to a WebSocket, if it is that protocol that is offered."""
        offered = [it.strip() for it in request.headers.get("sec-websocket-protocol", "").split(",")]
        if protocol not in offered:
            raise Refused(400, "BadRequest", f"{protocol} is not among the protocols")
        key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        await self.switch(raw, {"Upgrade": "websocket", "Sec-WebSocket-Accept": accept, "Sec-WebSocket-Protocol": protocol})
        return WebSocket(raw)

    async def spdy(self, request, raw, protocol):
        """Switches to SPDY."""
        offered = [it.strip() for it in request.headers.get("x-stream-protocol-version", "").split(",")]
        if request.upgrade() != "spdy/3.1" or protocol not in offered:
            raise Refused(400, "BadRequest", f"{protocol} over SPDY/3.1 is not among the protocols")
        await self.switch(raw, {"Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": protocol})
        return Spdy(raw)

    async def exec(self, request, raw):
        pairs = [("stdin", "input"), ("stdout", "output"), ("stderr", "error")]
        wanted = {name for name, other in pairs if request.says(name, other)}
        if request.upgrade() == "websocket":
            transport = await self.socket(request, raw, "v5.channel.k8s.io")
            pump = terminal = SocketTerminal(transport)
        else:
            pump, transport = await self.spdy(request, raw, "v4.channel.k8s.io"), raw
            terminal = SpdyTerminal(pump)
        await self.until_either(pump.run(), execute(terminal, request.query["command"], wanted))
        await transport.close()
        raise Gone("what was to be done is done")

    async def port_forward(self, request, raw):
        if request.upgrade() == "websocket":
            session = Spdy(await self.socket(request, raw, "SPDY/3.1+portforward.k8s.io"))
        else:
            session = await self.spdy(request, raw, "portforward.k8s.io")
        await self.until_either(session.run(), forward_ports(session))
        raise Gone("what was to be done is done")

    async def until_either(self, *both):
        tasks = [asyncio.create_task(it) for it in both]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def main(folder, address, plain):
    context = None
    if not plain:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.path.join(folder, "server.pem"), os.path.join(folder, "server.key"))
        context.load_verify_locations(os.path.join(folder, "ca.pem"))
        context.verify_mode = ssl.CERT_OPTIONAL
    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(Server(folder, plain).connection, host, int(port), ssl=context)
    print("API server listening on", "%s:%s" % server.sockets[0].getsockname(), flush=True)
    await server.serve_forever()


asyncio.run(main(sys.argv[1], sys.argv[2], "plain" in sys.argv[3:]))
