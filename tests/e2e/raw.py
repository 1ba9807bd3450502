"""A peer that says anything: SSH by Debian's paramiko up to the login, every message after it as the test wants it.

The tests in raw.rs run this and speak with it in JSON, one object a line: a command on standard input ("do" names it),
one answer on standard output. Bytes are hexadecimal. A command that fails answers {"error": …}.

paramiko does the key exchange, the signatures and, where it is the server, the login. What it lacks is added here:
AES-GCM (RFC 5647 with OpenSSH's names). Its connection layer is not used: messages from 80 up, and as a client those
from 50 up, go to the test as they came.
"""

import base64
import json
import os
import queue
import socket
import struct
import sys
import threading
import time

import logging

import paramiko
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from paramiko.common import asbytes
from paramiko.message import Message
from paramiko.packet import Packetizer
from paramiko.ssh_exception import SSHException

logging.getLogger("paramiko").addHandler(logging.NullHandler())

# OpenSSH's PROTOCOL, section 1.10, as a server offers it. With AES-GCM, whose nonces do not count from the first packet, to
# offer it is all there is to do: nothing is sent in the first exchange that does not belong there.
STRICT = "kex-strict-s-v00@openssh.com"

GCM = {"aes128-gcm@openssh.com": 16, "aes256-gcm@openssh.com": 32}
WINDOW = 2 * 1024 * 1024

# caponier's flow control between its own ends: extended data of this type returns what a sender has spent, which is the
# length of each message and a little more.
CREDIT_CODE = 0xFE000001
CREDIT = 16 * 1024
COST = 64

# How long what happens at once is waited for, in seconds, on a busy machine.
SOON = 30


class Engine:
    """One direction of AES-GCM: the nonce's last eight bytes count the packets."""

    def __init__(self, key, iv):
        self.cipher = AESGCM(key)
        self.fixed = iv[:4]
        self.count = struct.unpack(">Q", iv[4:12])[0]

    def nonce(self):
        nonce = self.fixed + struct.pack(">Q", self.count)
        self.count = (self.count + 1) % 2**64
        return nonce


class Packets(Packetizer):
    """paramiko's packets, and those of AES-GCM; what the test wants to see itself is taken out of the stream."""

    def __init__(self, sock, first):
        super().__init__(sock)
        self.out_engine = None
        self.in_engine = None
        self.lock = threading.Lock()
        # Messages from this number up are the test's.
        self.first = first
        self.taken = queue.Queue()
        self.seen = []
        self.number = 0

    def set_outbound_cipher(self, engine, *args, **kwargs):
        super().set_outbound_cipher(engine, *args, **kwargs)
        self.out_engine = engine

    def set_inbound_cipher(self, engine, *args, **kwargs):
        super().set_inbound_cipher(engine, *args, **kwargs)
        self.in_engine = engine

    def send_message(self, data):
        if self.out_engine is None:
            return super().send_message(data)
        data = asbytes(data)
        padding = 16 - (1 + len(data)) % 16
        if padding < 4:
            padding += 16
        length = struct.pack(">I", 1 + len(data) + padding)
        with self.lock:
            plain = bytes([padding]) + data + os.urandom(padding)
            self.write_all(length + self.out_engine.cipher.encrypt(self.out_engine.nonce(), plain, length))

    def send_packet_again(self, data, times):
        """The same message many times, as packets of their own in one write."""
        padding = 16 - (1 + len(data)) % 16
        padding += 16 if padding < 4 else 0
        length = struct.pack(">I", 1 + len(data) + padding)
        plain = bytes([padding]) + data + bytes(padding)
        engine = self.out_engine
        with self.lock:
            packets = (length + engine.cipher.encrypt(engine.nonce(), plain, length) for _ in range(times))
            self.write_all(b"".join(packets))

    def read_message(self):
        while True:
            if self.in_engine is None:
                kind, message = super().read_message()
            else:
                length = self.read_all(4, check_rekey=True)
                size = struct.unpack(">I", length)[0]
                if size > 512 * 1024:
                    raise SSHException("a packet of {} bytes".format(size))
                sealed = self.read_all(size + 16)
                plain = self.in_engine.cipher.decrypt(self.in_engine.nonce(), sealed, length)
                payload = plain[1 : size - plain[0]]
                kind, message = payload[0], Message(payload[1:])
                message.seqno = self.number
            self.number += 1
            self.seen.append(kind)
            # RFC 8308's extension information is news to this version of paramiko.
            if kind == 7:
                continue
            if kind == 1:
                self.taken.put((kind, message.asbytes()))
            if kind >= self.first:
                self.taken.put((kind, message.asbytes()))
                continue
            return kind, message


class Ssh(paramiko.Transport):
    """paramiko's transport with AES-GCM and the identification of the test's choice."""

    _cipher_info = dict(
        paramiko.Transport._cipher_info,
        **{name: {"class": None, "mode": None, "block-size": 16, "key-size": size} for name, size in GCM.items()},
    )
    _preferred_ciphers = tuple(GCM)
    _kex_info = dict(paramiko.Transport._kex_info, **{STRICT: None})

    def __init__(self, sock, identification, first):
        super().__init__(sock)
        self.packetizer = Packets(sock, first)
        self.packetizer.set_log(logging.getLogger("paramiko.transport"))
        if identification:
            self.local_version = identification

    def _get_cipher(self, name, key, iv, operation):
        return Engine(key, iv) if name in GCM else super()._get_cipher(name, key, iv, operation)


def string(data):
    data = data.encode() if isinstance(data, str) else data
    return struct.pack(">I", len(data)) + data


def number(value):
    return struct.pack(">I", value & 0xFFFFFFFF)


def text(data):
    """As text where it is UTF-8, and every other byte in a way that comes back."""
    return data.decode("utf-8", "backslashreplace")


def private_key(path):
    for kind in (paramiko.Ed25519Key, paramiko.RSAKey, paramiko.ECDSAKey):
        try:
            return kind.from_private_key_file(path)
        except (SSHException, ValueError, IndexError):
            continue
    raise ValueError("no private key in " + path)


class Admit(paramiko.ServerInterface):
    """The server's side of a login: takes any key, and remembers whose."""

    def __init__(self, admit):
        self.admit = admit
        self.logins = []
        self.done = threading.Event()

    def get_allowed_auths(self, username):
        return "publickey"

    def check_auth_publickey(self, username, key):
        login = {"user": username, "key": key.get_name() + " " + key.get_base64()}
        # A client may ask first whether the key would do.
        if login not in self.logins:
            self.logins.append(login)
        self.done.set()
        return paramiko.AUTH_SUCCESSFUL if self.admit else paramiko.AUTH_FAILED


def explain(kind, payload):
    """One message of the connection protocol (RFC 4254), as JSON."""
    m = Message(payload)
    out = {"message": kind}
    if kind == 80:
        out.update(name=text(m.get_binary()), reply=m.get_boolean(), rest=m.get_remainder().hex())
    elif kind == 90:
        out.update(type=text(m.get_binary()), sender=m.get_int(), window=m.get_int(), packet=m.get_int())
        if out["type"] in ("direct-tcpip", "forwarded-tcpip"):
            out.update(host=text(m.get_binary()), port=m.get_int())
            out.update(originator=text(m.get_binary()), originator_port=m.get_int())
        out["rest"] = m.get_remainder().hex()
    elif kind == 91:
        out.update(channel=m.get_int(), sender=m.get_int(), window=m.get_int(), packet=m.get_int())
    elif kind == 92:
        out.update(channel=m.get_int(), code=m.get_int(), text=text(m.get_binary()))
    elif kind == 93:
        out.update(channel=m.get_int(), bytes=m.get_int())
    elif kind == 94:
        out.update(channel=m.get_int(), data=m.get_binary().hex())
    elif kind == 95:
        out.update(channel=m.get_int(), code=m.get_int(), data=m.get_binary().hex())
    elif kind == 98:
        out.update(channel=m.get_int(), name=text(m.get_binary()), reply=m.get_boolean(), rest=m.get_remainder().hex())
    elif kind in (96, 97, 99, 100):
        out.update(channel=m.get_int())
    elif kind == 1:
        out.update(code=m.get_int(), text=text(m.get_binary()))
    else:
        out.update(rest=payload.hex())
    return out


class Channel:
    def __init__(self, mine):
        self.mine = mine
        self.theirs = None
        self.window = 0
        self.credit = CREDIT
        self.data = bytearray()
        self.eof = False
        self.closed = False
        self.close_sent = False
        # Without credit.
        self.control = False
        # What comes is counted, and nothing given back for it.
        self.kept = False
        self.count = 0
        # What the peer has given back: in how many messages, and how much.
        self.credits = 0
        self.given = 0


class Peer:
    def __init__(self):
        self.listener = None
        self.listeners = {}
        self.sock = None
        self.ssh = None
        self.admit = None
        self.channels = {}
        self.next = 0
        # Channels that the peer asked for, by its numbers.
        self.offered = {}
        self.ours = False
        # Messages nobody asked for yet, in order.
        self.waiting = []

    # Connections.

    def do_listen(self, address="127.0.0.1", port=0):
        self.listener = socket.create_server((address, port))
        port = self.listener.getsockname()[1]
        self.listeners[port] = self.listener
        return {"port": port}

    def do_accept(self, within=SOON, port=None):
        """A connection to the last listener, or to the one on this port."""
        self.drop()
        listener = self.listeners[port] if port else self.listener
        listener.settimeout(within)
        self.sock, peer = listener.accept()
        self.sock.settimeout(None)
        return {"from": peer[0]}

    def do_connect(self, port, address="127.0.0.1", source=None, within=SOON):
        self.drop()
        self.sock = socket.create_connection((address, port), within, (source, 0) if source else None)
        self.sock.settimeout(None)
        return {"local": "%s:%d" % self.sock.getsockname()}

    def drop(self):
        if self.ssh is not None:
            self.ssh.close()
        if self.sock is not None:
            self.sock.close()
        self.sock = self.ssh = self.admit = None
        self.channels = {}
        self.waiting = []

    def do_drop(self):
        self.drop()
        return {}

    # Key exchange and login.

    def start(self, identification, first, offers):
        self.ssh = Ssh(self.sock, identification, first)
        self.ours = identification.startswith("SSH-2.0-caponier_1 ")
        for what in ("kex", "ciphers", "macs", "compression", "keys"):
            if what in offers:
                setattr(self.ssh, "_preferred_" + what, tuple(offers[what]))

    def do_client(self, identification="SSH-2.0-paramiko_2.12.0", within=SOON, **offers):
        """The key exchange, as its client."""
        self.start(identification, 50, offers)
        began = time.monotonic()
        try:
            self.ssh.start_client(timeout=within)
        except (SSHException, EOFError, OSError) as error:
            return {
                "exchanged": False,
                "why": "{}: {}".format(type(error).__name__, error),
                "seen": self.ssh.packetizer.seen,
                "seconds": time.monotonic() - began,
            }
        key = self.ssh.get_remote_server_key()
        return {
            "exchanged": True,
            "line": self.ssh.remote_version,
            "key": key.get_name() + " " + key.get_base64(),
            "cipher": self.ssh.remote_cipher,
        }

    def do_server(
        self, identification, key, admit=True, within=SOON, certificate=None, disguise=False, strict=True, **offers
    ):
        """The key exchange, as its server, and a login; answers once that is there, or will not be."""
        self.start(identification, 80, offers)
        host_key = private_key(key)
        if certificate:
            self.present(host_key, certificate, disguise)
        self.ssh.add_server_key(host_key)
        if strict:
            self.ssh._preferred_kex += (STRICT,)
        self.admit = Admit(admit)
        exchanged = threading.Event()
        self.ssh.start_server(exchanged, self.admit)
        until = time.monotonic() + within
        while time.monotonic() < until:
            if self.admit.done.wait(0.02) or not self.ssh.is_active():
                break
        return {
            "exchanged": self.ssh.initial_kex_done,
            "seen": self.ssh.packetizer.seen,
            "logins": self.admit.logins,
            "open": self.ssh.is_active(),
            "line": self.ssh.remote_version,
        }

    def present(self, host_key, certificate, disguise):
        """Shows a host certificate in the place of the bare key; disguised, under the bare key's name."""
        kind, blob = open(certificate).read().split()[:2]
        blob = base64.b64decode(blob)
        host_key.asbytes = lambda: blob
        if disguise:
            return
        host_key.get_name = lambda: kind
        self.ssh._preferred_keys = (kind,)

    def do_service(self, name="ssh-userauth"):
        self.raw(bytes([5]) + string(name))
        return {}

    def do_login(self, user, method="publickey", key=None, password=None, body=None, service="ssh-connection",
                 within=SOON, algorithm=None, forge=False, certificate=None, probe=False):
        """One attempt to log in, or with probe one question whether the key would do; answers every message of it, bytes
        and all."""
        if not getattr(self.ssh, "served", False):
            self.ssh._expect_packet(6)
            self.raw(bytes([5]) + string("ssh-userauth"))
            self.ssh.served = True
        request = bytes([50]) + string(user) + string(service) + string(method)
        if method == "publickey":
            pair = private_key(key)
            algorithm = algorithm or pair.get_name()
            blob, signs = pair.asbytes(), algorithm
            if certificate:
                algorithm, blob = open(certificate).read().split()[:2]
                blob = base64.b64decode(blob)
            request += (b"\x00" if probe else b"\x01") + string(algorithm) + string(blob)
            if not probe:
                signed = os.urandom(32) if forge else self.ssh.session_id
                signature = pair.sign_ssh_data(string(signed) + request, signs)
                request += string(signature.asbytes())
        elif method == "password":
            request += b"\x00" + string(password or "")
        elif body is not None:
            request += bytes.fromhex(body)
        elif method == "keyboard-interactive":
            request += string("") + string("")
        began = time.monotonic()
        self.raw(request)
        answers = []
        while True:
            message = self.take(began + within)
            if message is None:
                seconds = time.monotonic() - began
                return {"ok": False, "answers": answers, "open": self.ssh.is_active(), "seconds": seconds}
            kind, payload = message
            answers.append((bytes([kind]) + payload).hex())
            if kind == 52:
                return {"ok": True, "answers": answers, "seconds": time.monotonic() - began}
            if kind in (51, 60, 61):
                return {"ok": False, "answers": answers, "open": True, "seconds": time.monotonic() - began}

    def do_probe(self, request, kind, blob, within=SOON):
        """Asks whether a key might log in, without a signature; answers the kind of the message."""
        self.raw(bytes.fromhex(request) + string(kind) + string(base64.b64decode(blob)))
        message = self.take(time.monotonic() + within)
        return {"message": message and message[0]}

    # Messages.

    def credit(self, channel, amount):
        data = number(amount)
        self.raw(bytes([95]) + number(channel.theirs) + number(CREDIT_CODE) + string(data))

    def raw(self, data):
        self.ssh.packetizer.send_message(data)

    def do_credit(self, id, amount, times=1):
        for _ in range(times):
            self.credit(self.channels[id], amount)
        return {}

    def do_raw(self, hex, times=1):
        for _ in range(times):
            self.raw(bytes.fromhex(hex))
        return {}

    def do_pour(self, hex, most, within=160, rate=0, channel=None):
        """A message over and over, as fast as it goes or so many a second, until `most` are sent or the connection has
        ended. What comes back is read and forgotten. With a channel, the message is about that one."""
        data = bytes.fromhex(hex)
        if channel is not None:
            data = data[:1] + number(self.channels[channel].theirs) + data[1:]
        batch = max(1, min(256, (1 << 18) // len(data)))
        began, sent, why = time.monotonic(), 0, None
        try:
            while sent < most and self.ssh.is_active() and time.monotonic() < began + within:
                if rate and sent > rate * (time.monotonic() - began):
                    time.sleep(0.005)
                    continue
                self.ssh.packetizer.send_packet_again(data, min(batch, most - sent))
                sent += batch
                # Without a wait: what is not there yet comes later, and the pace is what makes it a flood.
                while not self.ssh.packetizer.taken.empty() and self.pump(0):
                    pass
                self.waiting = []
        except Exception as error:
            why = str(error)
        return {"sent": sent, "seconds": time.monotonic() - began, "why": why, "open": self.ssh.is_active()}

    def do_bytes(self, hex):
        """Past SSH, straight into the socket."""
        self.sock.sendall(bytes.fromhex(hex))
        return {}

    def take(self, until):
        """The next message of the test's, or None once the connection has ended or the time is up."""
        while True:
            try:
                return self.ssh.packetizer.taken.get(timeout=0.02)
            except queue.Empty:
                if time.monotonic() > until:
                    return None
                if not self.ssh.is_active() and self.ssh.packetizer.taken.empty():
                    return None

    def pump(self, until):
        """Takes one message, keeps its channel's books, and puts it among those that wait. False where there is none."""
        message = self.take(until)
        if message is None:
            return False
        m = explain(*message)
        kind = m["message"]
        channel = self.channels.get(m.get("channel")) if kind != 80 else None
        if kind == 80 and m["reply"]:
            # A keepalive, or something that this peer does not do either.
            self.raw(bytes([82]))
        if kind == 90:
            self.offered[m["sender"]] = m
        if channel is not None:
            if kind == 91:
                channel.theirs, channel.window = m["sender"], m["window"]
            elif kind == 92:
                channel.closed = True
            elif kind == 93:
                channel.window += m["bytes"]
                return True
            elif kind == 94:
                length = len(m["data"]) // 2
                channel.count += length
                if channel.kept:
                    return True
                channel.data += bytes.fromhex(m["data"])
                self.raw(bytes([93]) + number(channel.theirs) + number(length))
                if self.ours and not channel.control:
                    self.credit(channel, length + COST)
                return True
            elif kind == 95 and m["code"] == CREDIT_CODE:
                channel.credit += int(m["data"], 16)
                channel.credits += 1
                channel.given += int(m["data"], 16)
                return True
            elif kind == 96:
                channel.eof = True
            elif kind == 97:
                channel.closed = True
                if not channel.close_sent:
                    channel.close_sent = True
                    self.raw(bytes([97]) + number(channel.theirs))
        self.waiting.append(m)
        return True

    def wait(self, wanted, within):
        """The first message for which `wanted` holds; the others keep waiting."""
        until = time.monotonic() + within
        looked = 0
        while True:
            while looked < len(self.waiting):
                if wanted(self.waiting[looked]):
                    return self.waiting.pop(looked)
                looked += 1
            if not self.pump(until):
                return None

    def gone(self):
        return {"nothing": True, "open": self.ssh.is_active()}

    def do_next(self, messages, within=SOON):
        return self.wait(lambda m: m["message"] in messages, within) or self.gone()

    def do_open(self, type, host=None, port=0, originator="127.0.0.1", originator_port=1, host_hex=None, rest="",
                within=SOON, answer=True, window=WINDOW, packet_size=32768):
        """Opens a channel; its answer is the peer's."""
        channel = Channel(self.next)
        self.channels[self.next] = channel
        self.next += 1
        packet = bytes([90]) + string(type) + number(channel.mine) + number(window) + number(packet_size)
        if host is not None or host_hex is not None:
            packet += string(host if host_hex is None else bytes.fromhex(host_hex)) + number(port)
            packet += string(originator) + number(originator_port)
        channel.control = type == "session"
        self.raw(packet + bytes.fromhex(rest))
        if not answer:
            return {"id": channel.mine}
        return self.opened(channel.mine, within)

    def opened(self, id, within):
        m = self.wait(lambda m: m["message"] in (91, 92) and m["channel"] == id, within) or self.gone()
        return dict(m, id=id)

    def do_open_many(self, count, host, port, within=SOON, originator="127.0.0.1"):
        """Opens many forwards without waiting for one; answers how each was answered, in their order."""
        ids = []
        for _ in range(count):
            ids.append(self.do_open("direct-tcpip", host, port, originator, answer=False)["id"])
        until, answers = time.monotonic() + within, {}
        while len(answers) < count and self.pump(until):
            for m in self.waiting:
                if m["message"] in (91, 92) and m["channel"] in ids:
                    answers[m["channel"]] = "opened" if m["message"] == 91 else m["text"]
        self.waiting = [m for m in self.waiting if m["message"] not in (91, 92)]
        return {"ids": ids, "answers": [answers.get(id) for id in ids], "open": self.ssh.is_active()}

    def do_opened(self, id, within=SOON):
        return self.opened(id, within)

    def do_request(self, id, name, reply=True, rest="", within=SOON):
        """A request on a channel; the answer is the peer's reply, or the end of the channel."""
        self.raw(bytes([98]) + number(self.channels[id].theirs) + string(name) + bytes([reply]) + bytes.fromhex(rest))
        if not reply:
            return {}
        return self.wait(lambda m: m["message"] in (97, 99, 100) and m["channel"] == id, within) or self.gone()

    def do_global(self, name, reply=True, rest="", within=SOON):
        self.raw(bytes([80]) + string(name) + bytes([reply]) + bytes.fromhex(rest))
        if not reply:
            return {}
        return self.wait(lambda m: m["message"] in (81, 82), within) or self.gone()

    def do_send(self, id, hex):
        channel = self.channels[id]
        channel.window -= len(hex) // 2
        self.raw(bytes([94]) + number(channel.theirs) + string(bytes.fromhex(hex)))
        return {}

    def do_flood(self, id, bytes_, heed=False, within=30, extended=False):
        """Sends `bytes_` bytes, within window and credit or without a look at them, until they are sent, the channel or the
        connection has ended, or the time is up: then a write may still be stuck."""
        channel, until, sent = self.channels[id], time.monotonic() + within, [0]
        kind = bytes([95]) + number(channel.theirs) + number(1) if extended else bytes([94]) + number(channel.theirs)
        why = []

        def write():
            begged = None
            try:
                while sent[0] < bytes_ and self.ssh.is_active() and time.monotonic() < until and not channel.closed:
                    length = 32768
                    if heed:
                        length = min(length, channel.window)
                        if self.ours:
                            length = min(length, channel.credit - COST)
                    if length < 4096:
                        # Once for each time that it runs out: no credit, and bytes to send.
                        if self.ours and channel.credit < 4096 + COST and begged != channel.credit:
                            begged = channel.credit
                            self.credit(channel, 0)
                        time.sleep(0.01)
                        continue
                    self.raw(kind + string(b"x" * length))
                    begged = None
                    channel.window -= length
                    channel.credit -= length + COST
                    sent[0] += length
            except Exception as error:
                why.append(str(error))

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        while writer.is_alive() and time.monotonic() < until:
            self.pump(time.monotonic() + 0.02)
        return {"sent": sent[0], "why": why, "stuck": writer.is_alive(), "open": self.ssh.is_active(),
                "channel_closed": channel.closed, "window": channel.window, "credit": channel.credit}

    def do_keep(self, id):
        """From now on, what comes on this channel is counted and not given back: neither credit nor window."""
        self.channels[id].kept = True
        return {}

    def do_quiet(self, seconds=0.5, within=20):
        """Takes what comes until nothing has come for so long."""
        until, last = time.monotonic() + within, time.monotonic()
        while time.monotonic() < until and time.monotonic() - last < seconds:
            if self.pump(time.monotonic() + 0.05):
                last = time.monotonic()
        return {}

    def do_books(self, id):
        channel = self.channels[id]
        return {"received": channel.count, "credits": channel.credits, "given": channel.given, "credit": channel.credit,
                "window": channel.window, "eof": channel.eof, "closed": channel.closed, "open": self.ssh.is_active()}

    def do_flood_many(self, ids, size=32768, most=1 << 40, within=30):
        """Sends messages of one size on many channels until neither has credit or window left for one, or `most` bytes
        are sent: begs on all of them first, while nothing lies at the other end, so that they get all they can."""
        channels = [self.channels[id] for id in ids]
        until = time.monotonic() + within
        for _ in range(12):
            for channel in channels:
                self.credit(channel, 0)
            self.do_quiet(0.2, within)
        begged = sum(channel.credit for channel in channels)
        sent = messages = 0
        data = string(b"x" * size)
        while sent < most and time.monotonic() < until and self.ssh.is_active():
            before = sent
            for channel in channels:
                for _ in range(64):
                    if channel.window < size or channel.credit < size + COST or sent >= most or channel.closed:
                        break
                    self.raw(bytes([94]) + number(channel.theirs) + data)
                    channel.window -= size
                    channel.credit -= size + COST
                    sent += size
                    messages += 1
            if sent == before:
                break
            while self.pump(0):
                pass
        return {"begged": begged, "sent": sent, "messages": messages, "open": self.ssh.is_active()}

    def do_receive(self, id, bytes_, within=SOON):
        channel, until = self.channels[id], time.monotonic() + within
        while len(channel.data) < bytes_ and not channel.closed and not channel.eof:
            if not self.pump(until):
                break
        data = bytes(channel.data[:bytes_])
        del channel.data[:bytes_]
        return {"data": data.hex(), "eof": channel.eof, "closed": channel.closed}

    def do_close(self, id, within=SOON, wait=True):
        channel = self.channels[id]
        if not channel.close_sent:
            channel.close_sent = True
            self.raw(bytes([97]) + number(channel.theirs))
        until = time.monotonic() + within
        while wait and not channel.closed and self.pump(until):
            pass
        return {"closed": channel.closed}

    def do_eof(self, id):
        self.raw(bytes([96]) + number(self.channels[id].theirs))
        return {}

    def do_accept_channel(self, sender, window=WINDOW, packet=32768):
        """Confirms a channel that the peer opened; `sender` is its number there."""
        channel = Channel(self.next)
        channel.theirs, channel.window = sender, self.offered[sender]["window"]
        channel.control = self.offered[sender]["type"] == "session"
        self.channels[self.next] = channel
        self.next += 1
        self.raw(bytes([91]) + number(sender) + number(channel.mine) + number(window) + number(packet))
        return {"id": channel.mine}

    def do_refuse_channel(self, sender, code, text="", text_hex=None):
        said = text if text_hex is None else bytes.fromhex(text_hex)
        self.raw(bytes([92]) + number(sender) + number(code) + string(said) + string(""))
        return {}

    def do_reply(self, id, ok=True):
        self.raw(bytes([99 if ok else 100]) + number(self.channels[id].theirs))
        return {}

    def do_closed(self, within=SOON):
        """Waits until the connection has ended."""
        until = time.monotonic() + within
        while self.ssh.is_active() and time.monotonic() < until:
            self.pump(time.monotonic() + 0.05)
        return {"closed": not self.ssh.is_active(), "seen": self.ssh.packetizer.seen[-8:]}

    def do_seen(self):
        return {"seen": self.ssh.packetizer.seen, "open": self.ssh.is_active()}


def main():
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        do = getattr(peer, "do_" + command.pop("do"))
        try:
            answer = do(**command)
        except Exception as error:
            answer = {"error": "{}: {}".format(type(error).__name__, error)}
        print(json.dumps(answer), flush=True)
    # paramiko's threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
