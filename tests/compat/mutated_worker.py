"""Reads mutated files in a process of its own: python mutated_worker.py FIRST LAST. Ends with one line of JSON.

Before each file its seed is written to standard output: where this process dies, the last one says of what.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

_SPARE = 256 << 20  # of the promise: at most twice the file and this
_MOST_SECONDS = 60
_ADDRESSES = 6 << 30  # more than torch maps and the promise together: the backstop
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "ctypes.dlopen", "pickle.find_class",
)  # fmt: skip
watching = False


def watch(event: str, args: tuple) -> None:
    if not watching:
        return
    if event == "open":
        mode, flags = args[1], args[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            raise AssertionError(f"a file was opened for writing: {args}")
    elif event in _FORBIDDEN:
        raise AssertionError(f"{event} was called: {args}")


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key}")


def main(first: int, last: int) -> None:
    global watching
    warnings.simplefilter("ignore")
    from mutations import corpus, mutated

    from dalle_fast.compat.formats.recognise import recognise
    from dalle_fast.compat.measuring import tensors_in
    from dalle_fast.compat.reading import UnreadableFile, UnsafeFile, read

    files = corpus()
    folder = Path.cwd()
    path = folder / "file"
    for data in files.values():  # everything that is imported at first use
        path.write_bytes(data)
        with suppress(ValueError):
            recognise(read(path))
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + _ADDRESSES,) * 2)
    sys.addaudithook(watch)
    counts = {"data": 0, "known": 0, "unreadable": 0, "unsafe": 0, "unknown": 0}
    most = 0
    for seed in range(first, last):
        what, data = mutated(files, seed)
        os.write(1, f"{seed} {what}\n".encode())
        path.write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        signal.alarm(_MOST_SECONDS)
        watching = True
        try:
            try:
                stored = read(path)
                counts["data"] += 1
                tensors_in(stored)
                recognise(stored).describe(stored)
                counts["known"] += 1
            except UnreadableFile:
                counts["unreadable"] += 1
            except UnsafeFile:
                counts["unsafe"] += 1
            except ValueError:
                counts["unknown"] += 1
        finally:
            watching = False
        stored = None
        signal.alarm(0)
        taken = status("VmHWM") - before
        most = max(most, taken - 2 * len(data))
        assert taken <= 2 * len(data) + _SPARE, f"{taken} bytes for a file of {len(data)}"
        assert path.read_bytes() == data
        assert [entry.name for entry in folder.iterdir()] == ["file"]
    print(json.dumps({**counts, "most": most}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
