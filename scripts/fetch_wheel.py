#!/usr/bin/env python3
"""Downloads one wheel from the package index that pip is configured for, and goes on where an earlier call was cut off.

  fetch_wheel.py FOLDER NAME VERSION SHA256

pip itself starts a download anew each time. Its finder and its session are used here, so that index, mirrors, proxies and
certificates are those of the machine's pip configuration. The Python tag is fixed: every machine gets the same file.
What has arrived is kept in FOLDER/FILE.part until it is whole. Exit codes: 0 done, 3 another hash, 4 the download failed.
"""
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import time

from pip._vendor.urllib3.exceptions import HTTPError

TAGS = ["--python-version", "311", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64",
        "--platform", "manylinux_2_25_x86_64", "--platform", "manylinux_2_17_x86_64",
        "--platform", "manylinux2014_x86_64", "--platform", "any"]
CHUNK = 1 << 20
ATTEMPTS = 5


class HashMismatch(Exception):
    pass


def find(name, version):
    """The session of pip, and the address of the file that `pip download` would take."""
    from pip._internal.cli.cmdoptions import make_target_python
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet
    command = create_command("download")
    # --no-cache-dir: the file is kept in FOLDER, a second copy in pip's cache is waste.
    options, _ = command.parse_args([*TAGS, "--only-binary=:all:", "--no-deps", "--no-cache-dir",
                                     "--disable-pip-version-check", f"{name}=={version}"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options=options, session=session,
                                               target_python=make_target_python(options))
        best = finder.find_best_candidate(name, specifier=SpecifierSet(f"=={version}")).best_candidate
    if best is None:
        raise OSError(f"the package index has no {name} {version} for Linux on x86_64, or cannot be reached")
    return session, best.link


def fetch_rest(session, url, part):
    """Appends to `part` (an open file) what it lacks; an error leaves it longer than before. True: it came in one piece."""
    have = part.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}
    if have > 0:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, stream=True) as response:
        if response.status_code == 416:  # nothing is missing
            return False
        response.raise_for_status()
        is_rest = response.status_code == 206
        if is_rest:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise OSError(f"the server continued at another place: {response.headers.get('Content-Range')}")
            print(f"fetch_wheel: going on after {have} bytes", flush=True)
        else:
            part.truncate(0)
            have = 0
        for block in response.raw.stream(CHUNK, decode_content=False):
            part.write(block)
            part.flush()
        missing = have + int(response.headers.get("Content-Length", 0)) - part.tell()
        if missing > 0:
            raise OSError(f"the connection ended {missing} bytes too early")
    return not is_rest


def sha256_of(file):
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(CHUNK):
        digest.update(block)
    return digest.hexdigest()


def download(session, link, folder, sha256):
    target, part_file = folder / link.filename, folder / f"{link.filename}.part"
    with open(part_file, "ab+") as part:
        fcntl.flock(part, fcntl.LOCK_EX)  # two scripts may want the same file
        if target.exists():
            part_file.unlink(missing_ok=True)
            return
        for attempt in range(1, ATTEMPTS + 1):
            try:
                came_in_one_piece = fetch_rest(session, link.url_without_fragment, part)
            except (OSError, HTTPError) as error:
                print(f"fetch_wheel: {link.filename}: {error} (attempt {attempt} of {ATTEMPTS})", file=sys.stderr)
                if attempt < ATTEMPTS:
                    time.sleep(attempt)
                continue
            if sha256_of(part) == sha256:
                part_file.rename(target)
                return
            part.truncate(0)
            if came_in_one_piece:
                part_file.unlink()
                sys.exit(3)
    sys.exit(4)


def main():
    folder, (name, version, sha256) = pathlib.Path(sys.argv[1]), sys.argv[2:5]
    try:
        session, link = find(name, version)
    except OSError as error:
        print(f"fetch_wheel: {error}", file=sys.stderr)
        sys.exit(4)
    except (ImportError, AttributeError, TypeError) as error:
        print(f"fetch_wheel: this pip is built differently ({error}): its own download starts anew when it is cut off")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *TAGS]
        sys.exit(4 if subprocess.run([*command, "--dest", str(folder), f"{name}=={version}"], check=False).returncode else 0)
    download(session, link, folder, sha256)


if __name__ == "__main__":
    main()
