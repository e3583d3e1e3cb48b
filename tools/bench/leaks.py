#!/usr/bin/env python3
"""What a crash leaves of a qcow2 image: leaks, how often, ours beside qemu-io's.

Both programs carry out the same random writes, zeroes, discards and flushes on an image of 16 MiB through their own
`blklogwrites`. `qemu-img check` judges the image after every entry of the log. Run: tools/bench/leaks.py [SEEDS]
"""

import collections
import os
import random
import struct
import subprocess
import sys
import tempfile

SIZE = 16 << 20
# The file's end is fixed: our filter does not let it move.
FILE = 64 << 20
SECTOR = 512
DISCARD = 4
WORDS = {0: "clean", 2: "corrupt", 3: "leaks only"}


def operations(seed, count=300):
    dice = random.Random(seed)
    for _ in range(count):
        kind = dice.choices(["write", "zero", "discard", "flush"], [5, 2, 2, 1])[0]
        at = dice.randrange(SIZE // SECTOR) * SECTOR
        length = min(dice.choice([512, 4096, 65536, 131072, dice.randrange(1, 256) * SECTOR]), SIZE - at)
        yield {
            "write": f"write -P {dice.randrange(1, 255)} {at} {length}",
            "zero": f"write -z {at} {length}",
            "discard": f"discard {at} {length}",
            "flush": "flush",
        }[kind]


def entries(log):
    """Where each change is, and its bytes."""
    (count,) = struct.unpack_from("<Q", log, 16)
    (sector,) = struct.unpack_from("<I", log, 24)
    place = sector
    for _ in range(count):
        start, sectors, flags, _ = struct.unpack_from("<QQQQ", log, place)
        place += sector
        start, length = start * sector, sectors * sector
        if flags & DISCARD:
            yield start, bytes(length)
        elif length:
            yield start, log[place : place + length]
            place += length


def judged(program, seed, folder):
    image, log, state = (os.path.join(folder, name) for name in ("image", "log", "state"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    os.truncate(image, FILE)
    with open(image, "rb") as file:
        disk = bytearray(file.read())
    with open(log, "wb") as file:
        file.truncate(1 << 30)
    options = (
        f"driver=qcow2,discard=unmap,file.driver=blklogwrites,file.file.driver=file,file.file.filename={image},"
        f"file.log.driver=file,file.log.filename={log}"
    )
    script = "\n".join([*operations(seed), "quit", ""])
    done = subprocess.run([program, "--image-opts", options], input=script, capture_output=True, text=True)
    if done.returncode or "failed" in done.stdout + done.stderr:
        sys.exit(f"{program}: {done.stdout[-300:]}{done.stderr[-300:]}")
    with open(log, "rb") as file:
        written = file.read()
    found = collections.Counter()
    for start, data in entries(written):
        disk[start : start + len(data)] = data
        with open(state, "wb") as file:
            file.write(disk.rstrip(b"\0"))
            file.truncate(FILE)
        code = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", state], capture_output=True).returncode
        found[WORDS.get(code, f"code {code}")] += 1
    if not found:
        sys.exit(f"{program}: its log is empty")
    return found


def main():
    ours = os.path.join(os.path.dirname(__file__), "../../target/release/trellis-io")
    for seed in range(1, int((sys.argv[1:] or ["2"])[0]) + 1):
        for program in (ours, "qemu-io"):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                found = judged(program, seed, folder)
            rate = 100 * found["leaks only"] / found.total()
            print(f"seed {seed}, {os.path.basename(program)}: {dict(found)}, {rate:.1f} % leaks only", flush=True)


if __name__ == "__main__":
    main()
