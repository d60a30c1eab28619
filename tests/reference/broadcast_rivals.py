"""Rivals of `muster-bench broadcast`: one process per host, the same object, the same links, the same words.

broadcast_rivals.py star|libtorrent HOST FOLDER, where FOLDER holds plan.json and object.bin. Host 0 has the object. Says
`ready`, waits for a line, says {"seconds": ..} when it has everything, waits for the end of its input, says what it counted.

star: a threaded HTTP server and plain GETs. libtorrent: 2.1.1 (PyPI), tuned for one short broadcast: super-seeding, peers
given directly, no discovery, unchoking every second, 64 KiB pieces, TCP only.
"""

import hashlib
import http.server
import json
import os
import resource
import shutil
import sys
import threading
import time
import urllib.request
import warnings

KIND, HOST, FOLDER = sys.argv[1], int(sys.argv[2]), sys.argv[3]
PLAN = json.load(open(os.path.join(FOLDER, "plan.json")))
ADDRESSES = PLAN["addresses"]
OBJECT = os.path.join(FOLDER, "object.bin")
PORT = 7000
PIECE = 64 << 10


def say(line):
    print(line, flush=True)


def wait_for_start():
    say("ready")
    sys.stdin.readline()
    return time.monotonic()


def finish(begun, sent_bytes, twice_bytes):
    say(json.dumps({"seconds": time.monotonic() - begun}))
    sys.stdin.read()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    counted = {
        "sent_bytes": sent_bytes(),
        "twice_bytes": twice_bytes(),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_peak_bytes": usage.ru_maxrss * 1024,
    }
    say(json.dumps(counted))
    os._exit(0)


def star():
    sent = [0]
    if HOST == 0:
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                size = os.path.getsize(OBJECT)
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                with open(OBJECT, "rb") as file:
                    while block := file.read(PIECE):
                        self.wfile.write(block)
                with lock:
                    sent[0] += size

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer((ADDRESSES[0], PORT), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begun = wait_for_start()
    else:
        begun = wait_for_start()
        digest, size = hashlib.blake2b(), 0
        with urllib.request.urlopen(f"http://{ADDRESSES[0]}:{PORT}/") as answer:
            while block := answer.read(PIECE):
                digest.update(block)
                size += len(block)
        assert size == PLAN["object"]["bytes"], size
    finish(begun, lambda: sent[0], lambda: 0)


def libtorrent():
    import libtorrent as lt

    # The old way to make a torrent is the one that libtorrent 2.0 knows too.
    warnings.simplefilter("ignore", DeprecationWarning)
    # Every host makes the same torrent from the object that all of them can read; only host 0 uses it as its data.
    files = lt.file_storage()
    lt.add_files(files, OBJECT)
    torrent = lt.create_torrent(files, PIECE, lt.create_torrent.v1_only)
    lt.set_piece_hashes(torrent, FOLDER)
    info = lt.torrent_info(lt.bdecode(lt.bencode(torrent.generate())))
    session = lt.session({
        "listen_interfaces": f"{ADDRESSES[HOST]}:{PORT}",
        "enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False,
        "enable_outgoing_utp": False, "enable_incoming_utp": False,
        "allow_multiple_connections_per_ip": True,
        "unchoke_interval": 1, "optimistic_unchoke_interval": 2, "unchoke_slots_limit": 4,
        "choking_algorithm": 0, "seed_choking_algorithm": 1, "connections_limit": 200,
        "connection_speed": 200, "min_reconnect_time": 1, "torrent_connect_boost": 100,
        "send_buffer_watermark": 128 << 10, "send_buffer_low_watermark": 16 << 10, "send_buffer_watermark_factor": 50,
        "request_queue_time": 1, "whole_pieces_threshold": 1, "close_redundant_connections": False,
        "rate_limit_ip_overhead": False, "mixed_mode_algorithm": 0, "alert_mask": 0,
    })
    params = lt.add_torrent_params()
    params.ti = info
    params.save_path = FOLDER if HOST == 0 else os.path.join(FOLDER, f"host-{HOST}")
    if HOST > 0:  # what an earlier run fetched
        shutil.rmtree(params.save_path, ignore_errors=True)
    params.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if HOST == 0:
        params.flags |= lt.torrent_flags.super_seeding | lt.torrent_flags.seed_mode
    begun = None
    if HOST > 0:
        begun = wait_for_start()
    handle = session.add_torrent(params)
    if HOST == 0:
        begun = wait_for_start()
    for number, address in enumerate(ADDRESSES):
        if number != HOST:
            handle.connect_peer((address, PORT))
    while HOST > 0 and not handle.status().is_seeding:
        time.sleep(0.02)
    status = lambda: handle.status()
    finish(begun, lambda: status().total_payload_upload, lambda: status().total_redundant_bytes)


{"star": star, "libtorrent": libtorrent}[KIND]()
