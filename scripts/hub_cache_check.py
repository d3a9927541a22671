"""Whether Python's huggingface_hub reads the cache that `generate` writes, and the other way round.

    pip install huggingface_hub==2.4.0
    cargo build --release --example generate && python scripts/hub_cache_check.py

A server on this machine stands for the Hub; it serves examples/tiny_world as owner/name.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/tiny_world"
GENERATE = sys.argv[1] if len(sys.argv) > 1 else ROOT / "target/release/examples/generate"
COMMIT = "c" * 40
FILES = {name: (MODEL / name).read_bytes() for name in
         ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]}


def etag(name):
    content = FILES[name]
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def listed(name):
    entry = {"rfilename": name, "size": len(FILES[name]), "blobId": etag(name)}
    if name.endswith(".safetensors"):
        entry |= {"blobId": "0" * 40, "lfs": {"sha256": etag(name), "size": len(FILES[name]), "pointerSize": 130}}
    return entry


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        body, headers = b"", {}
        if "/api/models/owner/name/tree/" in path:
            body = json.dumps([{"type": "file", "path": name, "size": len(FILES[name]), "oid": listed(name)["blobId"]}
                               | ({"lfs": {"oid": etag(name), "size": len(FILES[name]), "pointerSize": 130}}
                                  if "lfs" in listed(name) else {}) for name in FILES]).encode()
        elif path.startswith("/api/models/owner/name"):
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": [listed(n) for n in FILES]}).encode()
        elif name in FILES:
            body = FILES[name]
            headers = {"ETag": f'"{etag(name)}"', "X-Repo-Commit": COMMIT}
        self.send_response(200 if body else 404)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"


def run(command, home, **more):
    environment = os.environ | {"HF_HOME": home, "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"} | more
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


generate = [GENERATE, "--model", "owner/name", "Where does the fox live?"]
download = [sys.executable, "-c", "from huggingface_hub import snapshot_download, scan_cache_dir\n"
            "print(snapshot_download('owner/name', allow_patterns=['*.json', '*.safetensors']))\n"
            "found = scan_cache_dir(); assert not found.warnings, found.warnings\n"
            "print(sorted(file.file_name for file in list(list(found.repos)[0].revisions)[0].files))"]
with tempfile.TemporaryDirectory() as home:
    answer = run(generate, home)
    print("written here, read by huggingface_hub:", run(download, home, HF_HUB_OFFLINE="1"), sep="\n")
with tempfile.TemporaryDirectory() as home:
    run(download, home)
    assert run(generate, home, HF_HUB_OFFLINE="1") == answer
    print("written by huggingface_hub, read here:", answer, sep="\n")
