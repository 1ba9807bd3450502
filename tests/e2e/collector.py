"""A collector of audit records for the tests: HTTPS on 127.0.0.1, one answer after the other as a file says.

    collector.py PORT CERTIFICATE KEY FOLDER

FOLDER/answer holds what is answered: a status, or `redirect`. Bodies that were answered 200 are appended to
FOLDER/received, and each request has its line in FOLDER/asked: the status and the key that names it.
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
        answer = (folder / "answer").read_text().strip()
        authorised = self.headers["Authorization"] == "Bearer hunter2"
        status = 401 if not authorised else 307 if answer == "redirect" else int(answer)
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
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print("collecting", flush=True)
server.serve_forever()
