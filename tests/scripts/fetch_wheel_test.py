"""scripts/fetch_wheel.py against a package index of our own: it goes on where it was cut off, and it judges the hash."""
import hashlib
import http.server
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import unittest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "fetch_wheel.py"
WHEEL = "some_thing-1.0-py3-none-any.whl"
CONTENT = random.Random(1).randbytes(5_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Index(http.server.BaseHTTPRequestHandler):
    """One project with one file. The server says how many bytes an answer may have, and whether parts are served."""
    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self.path.endswith(".whl"):
            body = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        begin = int(asked[len("bytes="):-1]) if asked and self.server.serves_parts else 0
        if begin >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        self.wfile.write(CONTENT[begin:begin + self.server.limits.pop(0) if self.server.limits else None])


class FetchWheel(unittest.TestCase):
    def setUp(self):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
        self.server.ranges, self.server.limits, self.server.serves_parts = [], [], True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self.temporary.name)

    def tearDown(self):
        self.server.shutdown()
        self.server.server_close()
        self.temporary.cleanup()

    def fetch(self, sha256=SHA256):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        environment.update(PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL=f"http://127.0.0.1:{self.server.server_port}/simple",
                           PIP_RETRIES="0", no_proxy="127.0.0.1")
        command = [sys.executable, str(SCRIPT), str(self.folder), "some-thing", "1.0", sha256]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def expect_whole(self, result):
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual((self.folder / WHEEL).read_bytes(), CONTENT)
        self.assertEqual(os.listdir(self.folder), [WHEEL])

    def test_a_connection_that_ends_early_is_taken_up_again(self):
        self.server.limits = [2_000_000, 1_000_000]
        self.expect_whole(self.fetch())
        self.assertEqual(self.server.ranges, [None, "bytes=2000000-", "bytes=3000000-"])

    def test_a_later_call_goes_on_with_what_an_earlier_one_left(self):
        (self.folder / f"{WHEEL}.part").write_bytes(CONTENT[:1_234_567])
        self.expect_whole(self.fetch())
        self.assertEqual(self.server.ranges, ["bytes=1234567-"])

    def test_a_part_that_is_whole_is_taken(self):
        (self.folder / f"{WHEEL}.part").write_bytes(CONTENT)
        self.expect_whole(self.fetch())

    def test_a_damaged_part_is_fetched_anew(self):
        (self.folder / f"{WHEEL}.part").write_bytes(b"x" * 1000)
        self.expect_whole(self.fetch())
        self.assertEqual(self.server.ranges, ["bytes=1000-", None])

    def test_a_server_without_parts_gives_the_whole_file(self):
        self.server.serves_parts = False
        (self.folder / f"{WHEEL}.part").write_bytes(CONTENT[:1000])
        self.expect_whole(self.fetch())

    def test_another_hash_is_code_3_and_leaves_nothing(self):
        self.assertEqual(self.fetch(sha256="0" * 64).returncode, 3)
        self.assertEqual(os.listdir(self.folder), [])

    def test_no_such_file_is_code_4(self):
        self.server.shutdown()
        self.server.server_close()
        result = self.fetch()
        self.assertEqual(result.returncode, 4)
        self.assertIn("some-thing 1.0", result.stderr)


if __name__ == "__main__":
    unittest.main()
