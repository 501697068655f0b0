"""Put a server under load, then among hostile clients, and say what came of it, in Markdown.

    python tools/dev/serve_bench.py FILE [CHECKPOINT] --clients 8 --requests 1000

`spartan-mm serve` runs in a process of its own. Clients keep their connections, and each sends its
next picture when it has the answer to the last. The hostile ones send image bombs, garbage,
requests drop by drop and halves of them, and go away before they are answered.
"""
import argparse
import contextlib
import http.client
import io
import itertools
import json
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spartan_mm.analysis.benchmark import describe_machine, machine_line
from spartan_mm.text import markdown


def main() -> int:
    """Start the server, load it three times, and stop it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='+', metavar='FILE', help='what the command serve takes')
    parser.add_argument('--requests', type=int, default=1000, metavar='N')
    parser.add_argument('--clients', type=int, default=8, metavar='N')
    parser.add_argument('--size', type=int, nargs=2, default=(640, 480), metavar=('W', 'H'),
                        help='of the pictures, JPEGs of noise over slopes')
    args, flags = parser.parse_known_args()
    pictures, rows = [make_picture(*args.size, seed) for seed in range(32)], []
    command = [sys.executable, '-m', 'spartan_mm.cli', 'serve', *args.words, '--port', '0', *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if match := re.search(r'http://([\d.]+):(\d+)/', line):
                break
        else:
            return 1
        place = match[1], int(match[2])
        lost = 0
        for kind in ('alone', 'among hostile clients', 'among them again'):
            with contextlib.ExitStack() as stack:
                hostile = stack.enter_context(attack(place)) if kind != 'alone' else None
                memory = stack.enter_context(watch_memory(process.pid))
                answers, seconds = load(place, pictures, args.clients, args.requests)
            times = sorted(time for status, time in answers if status == 200)
            cuts = statistics.quantiles(times, n=20)
            lost += args.requests - len(times)
            rows.append([kind, f'{len(times)} of {args.requests}', f'{len(times) / seconds:.1f}',
                         f'{1000 * cuts[9]:.0f}', f'{1000 * cuts[18]:.0f}',
                         f'{memory[len(memory) // 10]:.0f}', f'{memory[-1]:.0f}',
                         f'{max(memory):.0f}'])
            if hostile is not None:
                print('hostile clients:', ', '.join(
                    f'{number} {name}' for name, number in sorted(hostile.items())))
        connection = http.client.HTTPConnection(*place)
        connection.request('GET', '/metrics')
        counts = dict(line.split() for line in connection.getresponse().read().decode().splitlines()
                      if not line.startswith('#'))
        connection.close()
        process.send_signal(signal.SIGTERM)
        process.communicate()
    batches = float(counts['spartan_mm_pictures_total']) / float(counts['spartan_mm_batches_total'])
    print(machine_line(describe_machine(torch.device('cpu'))))
    print(f'{args.clients} clients; {batches:.1f} pictures a batch; status {process.returncode} '
          'after SIGTERM\n')
    print(markdown([['clients', 'answered', 'a second', 'p50, ms', 'p95, ms', 'MiB at a tenth',
                     'MiB at the end', 'MiB at most'], *rows]))
    return int(lost > 0 or process.returncode != 0)


def make_picture(width: int, height: int, seed: int) -> bytes:
    """Make a JPEG that is about as hard to decode as a photograph."""
    rng, content = np.random.default_rng(seed), io.BytesIO()
    slope = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
    pixels = slope + rng.normal(20, 12, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, 'JPEG', quality=90)
    return content.getvalue()


def load(place: tuple[str, int], pictures: list[bytes], clients: int, requests: int
         ) -> tuple[list[tuple[int, float]], float]:
    """Send pictures; give status and seconds of each answer, and the seconds of all."""
    numbers, answers = iter(range(requests)), []

    def run() -> None:
        connection = http.client.HTTPConnection(*place, timeout=300)
        for number in numbers:
            start = time.perf_counter()
            connection.request('POST', '/predict', pictures[number % len(pictures)])
            response = connection.getresponse()
            json.loads(response.read())
            answers.append((response.status, time.perf_counter() - start))
        connection.close()

    start = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - start


@contextlib.contextmanager
def repeating(*steps):
    """Call functions over and over, each in a thread, until the block ends."""
    over = threading.Event()

    def run(step) -> None:
        while not over.is_set():
            step(over)

    threads = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def watch_memory(pid: int):
    """Give a list to which the resident memory of a process is added, in MiB, now and then."""
    values = []

    def step(over: threading.Event) -> None:
        status = Path(f'/proc/{pid}/status').read_text()
        values.append(int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024)
        over.wait(0.2)

    with repeating(step):
        yield values


@contextlib.contextmanager
def attack(place: tuple[str, int]):
    """Be hostile until the block ends; gives how often which client came."""
    counts: dict[str, int] = {}

    def client(name, content, pause, piece=2**16):
        head = b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n' % len(content)
        content = content if name == 'no HTTP' else head + content
        content = content[:len(content) // 2] if name == 'half' else content

        def step(over: threading.Event) -> None:
            with contextlib.suppress(OSError), socket.create_connection(place, 60) as own:
                for start in itertools.takewhile(lambda _: not over.is_set(),
                                                 range(0, len(content), piece)):
                    own.sendall(content[start:start + piece])
                    over.wait(pause if piece < 2**16 else 0)
                if name not in ('gone', 'half'):
                    own.recv(2**16)
                over.wait(pause)
            counts[name] = counts.get(name, 0) + 1
        return step

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack(
            '>I', zlib.crc32(kind + data))

    def png(side: int) -> bytes:
        return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0,
                                                               0, 0))
                + chunk(b'IDAT', zlib.compress(bytes(3 * side + 1) * min(side, 5000)))
                + chunk(b'IEND', b''))

    picture, noise = make_picture(640, 480, 0), np.random.default_rng(0).bytes(100_000)
    with repeating(client('bomb', png(30_000), 0.5), client('large', png(5000), 5),
                   client('too long', bytes(40 * 2**20), 2), client('garbage', noise, 0.2),
                   client('no HTTP', noise, 0.2), client('gone', picture, 0.5),
                   client('half', picture, 1), *[client('slow', picture, 0.5, 50)] * 8):
        yield counts


if __name__ == '__main__':
    sys.exit(main())
