"""`rayft rate` and `rayft ratings`: prepare the items, serve the page until it is stopped, say what the ratings say."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from rich.console import Console

from rayft.errors import JobError
from rayft.rate.agreement import measure, table
from rayft.rate.items import ITEMS, MOST, Item, load_items, read_answers, read_prompts, save_items
from rayft.rate.ledger import RATINGS, Ledger, read_events, standing
from rayft.rate.rows import write_rows
from rayft.rate.server import Desk, Settings, application, link_key
from rayft.storage import node_cache_dir

SECRET = ".secret"


@dataclass(frozen=True)
class Source:
    """Where the answers come from: a file that has them, or prompts and the models that are to answer them."""

    answers: str | None = None
    prompts: str | None = None
    models: Sequence[str] = ()
    limit: int | None = None
    samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0


def serve(
    folder: Path,
    source: Source,
    settings: Settings,
    *,
    host: str,
    port: int,
    name: str | None,
    console: Console,
) -> int:
    """Serve the page on host and port until Ctrl-C; then write the rows and show the agreement.

    name: under which raters reach the host, where that is not its address. A folder that holds items goes on with them.
    Raises JobError for settings that contradict each other, StorageError if the folder is another's or cannot be written.
    """
    if not _is_loopback(host) and not settings.token:
        raise JobError(
            f"--host {host} can be reached by others, and there is no token.",
            "Set --token SECRET or RAYFT_RATE_TOKEN (and --raters): every rater then gets a personal link.",
        )
    if settings.token and not settings.raters:
        raise JobError("A token makes personal links, and nobody is named.", "Give --raters ann,bob.")
    if host in ("0.0.0.0", "::") and not name:
        raise JobError(
            f"--host {host} is every address of this machine, and none to put into a link.",
            "Give --allow-host NAME, the name or address under which raters reach it.",
        )
    ledger = Ledger(folder)
    try:
        items = _items(folder, source, console)
        if ledger.cut:
            console.print(f"A rating that was cut in mid-line is in {folder}/ratings.cut; it is asked again.")
        app = application(Desk(items, ledger, settings), _secret(folder))
        server = uvicorn.Server(
            uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False)
        )
        with _listening(host, port) as sock:
            console.print(
                f"{len(items)} items, {len(standing(ledger.events))} ratings so far. Stop with Ctrl-C."
            )
            for line in _links(settings, name or host, sock.getsockname()[1]):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            with contextlib.suppress(
                KeyboardInterrupt
            ):  # uvicorn has ended in order and raises the signal again
                server.run(sockets=[sock])
        return report(folder, console)
    finally:
        ledger.close()


def report(folder: Path, console: Console) -> int:
    """Write the ratings as rows to train on, and show the agreement."""
    items, events = load_items(folder), list(read_events(folder / RATINGS))
    written = write_rows(folder, items, list(standing(events).values()))
    console.print(table(measure(items, events)))
    for name, count in written.items():
        console.print(f"{count} rows are in {folder / name}.", soft_wrap=True, highlight=False, markup=False)
    return 0


def _items(folder: Path, source: Source, console: Console) -> list[Item]:
    given = source.answers or source.prompts
    if (folder / ITEMS).exists():
        if given:
            console.print(f"{folder} has its items already; {given} is not read again.")
        return load_items(folder)
    cache_dir = node_cache_dir()
    if source.answers:
        items = read_answers(source.answers, cache_dir=cache_dir, limit=source.limit)
    elif source.prompts and source.models:
        if not 2 <= source.samples * len(source.models) <= MOST:
            raise JobError(
                f"{len(source.models)} models with {source.samples} answers each make {source.samples * len(source.models)}.",
                f"From 2 to {MOST} answers can be compared: change --model or --samples.",
            )
        from rayft.rate.generate import generate_items

        items = generate_items(
            read_prompts(source.prompts, cache_dir=cache_dir, limit=source.limit),
            source.models,
            samples=source.samples,
            max_new_tokens=source.max_new_tokens,
            temperature=source.temperature,
            seed=source.seed,
            cache_dir=node_cache_dir(),
            say=console.print,
        )
    else:
        raise JobError(
            f"{folder} holds nothing to rate yet.",
            "Give --answers FILE, or --prompts FILE with --model once or more.",
        )
    save_items(folder, items)
    return items


def _links(settings: Settings, host: str, port: int) -> list[str]:
    shown = f"[{host}]" if ":" in host else host
    base = f"http://{shown}:{port}/"
    if not settings.token:
        return [f"Rate at {base}"]
    links = {
        name: urlencode({"rater": name, "key": link_key(settings.token, name)}) for name in settings.raters
    }
    return [f"{name}: {base}#{link}" for name, link in links.items()]


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket. Raises JobError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise JobError(
            f"{host}:{port} cannot be listened on: {str(error).rstrip('.')}.", "Give another --port."
        ) from None
    return sock


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _secret(folder: Path) -> str:
    """What sessions are signed with; kept in the folder, for its owner only, so that a restart ends none."""
    path = folder / SECRET
    if not path.exists() or len(path.read_text()) < 32:
        temporary = path.with_name(f"{SECRET}.{os.getpid()}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex())
        temporary.replace(path)
    return path.read_text()
