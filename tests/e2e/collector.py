"""A collector of audit records for the tests: HTTPS on 127.0.0.1, one answer after the other as a file says.

    collector.py PORT CERTIFICATE KEY FOLDER [AUTHORITY]

FOLDER/answer holds what is answered: a status, a status and a word (to bodies with that word, and 200 to others), or
`redirect`. FOLDER/wanted holds the token that is wanted, `hunter2` where there is none. With an AUTHORITY, a client must show a
certificate of it. Bodies that were answered 200 are appended to FOLDER/received, and each request has its line in
FOLDER/asked: the status and the key that names it.
"""

import http.server
import pathlib
import ssl
import sys

port, certificate, key, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4])


class Collector(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = (folder / "answer").read_text().split()
        wanted = folder / "wanted"
        token = wanted.read_text().strip() if wanted.exists() else "hunter2"
        if self.headers["Authorization"] != f"Bearer {token}":
            status = 401
        elif answer[0] == "redirect":
            status = 307
        elif len(answer) > 1 and answer[1].encode() not in body:
            status = 200
        else:
            status = int(answer[0])
        with open(folder / "asked", "a") as asked:
            asked.write(f"{status} {self.headers['Idempotency-Key']} {self.path}\n")
        if status == 200:
            with open(folder / "received", "ab") as received:
                received.write(body)
        self.send_response(status)
        if status == 307:
            self.send_header("Location", f"https://127.0.0.1:{port}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()


server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Collector)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
if len(sys.argv) > 5:
    context.load_verify_locations(sys.argv[5])
    context.verify_mode = ssl.CERT_REQUIRED
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print("collecting", flush=True)
server.serve_forever()
