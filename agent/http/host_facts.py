"""/v1/agent/host: what this host is, read from the kernel."""

import os
import platform
import socket
from pathlib import Path

import trio

JsonObject = dict[str, object]


async def host_facts(disk_path: str, *, now_s: float) -> JsonObject:
    """Memory, CPUs, host and the disk that holds `disk_path`; bytes and seconds. `now_s`: Unix time. Off the loop, as
    disks may hang.
    """
    return await trio.to_thread.run_sync(_gather, disk_path, now_s)


def _gather(disk_path: str, now_s: float) -> JsonObject:
    errors: list[str] = []
    facts: JsonObject = {}
    for name, read in (
        ("Memory", _memory),
        ("CPU", _cpus),
        ("Host", lambda: _host(now_s)),
        ("Disk", lambda: _disk(disk_path)),
    ):
        try:
            facts[name] = read()
        except (OSError, ValueError, LookupError) as error:
            facts[name] = None
            errors.append(f"{name}: {error}")
    return facts | {"CollectionTime": int(now_s * 1e9), "Errors": errors or None}


def _memory() -> JsonObject:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, available, free = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable", "MemFree"))
    used = total - available
    return {
        "total": total,
        "available": available,
        "used": used,
        "usedPercent": 100.0 * used / total,
        "free": free,
    }


def _cpus() -> list[JsonObject]:
    cpus: list[JsonObject] = []
    for block in Path("/proc/cpuinfo").read_text().split("\n\n"):
        rows = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        if "processor" in rows:
            megahertz = float(rows.get("cpu MHz", "0") or 0)
            cpus.append({"cpu": int(rows["processor"]), "modelName": rows.get("model name", ""), "mhz": megahertz})
    return cpus


def _host(now_s: float) -> JsonObject:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return {
        "hostname": socket.gethostname(),
        "uptime": int(uptime),
        "bootTime": int(now_s - uptime),
        "procs": sum(1 for entry in os.scandir("/proc") if entry.name.isdigit()),
        "os": platform.system().lower(),
        "kernelVersion": platform.release(),
        "kernelArch": platform.machine(),
    }


def _disk(path: str) -> JsonObject:
    figures = os.statvfs(path)
    total, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
    used = total - figures.f_bfree * figures.f_frsize
    return {
        "path": path,
        "total": total,
        "free": free,
        "used": used,
        "usedPercent": 100.0 * used / (used + free) if used + free else 0.0,
        "inodesTotal": figures.f_files,
        "inodesFree": figures.f_ffree,
    }
