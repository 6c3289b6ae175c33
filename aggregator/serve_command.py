"""`fedtt serve`: its options, and what it says once it listens."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aggregator.limit_arguments import limit_arguments
from fedtt.cli import add_command, print_json

if TYPE_CHECKING:
    from aggregator.member import Said
    from fedtt.cli import Commands

__all__ = ["ledger_arguments", "place_arguments", "reachable", "register"]

_MOST_PROCESSES = 64


def register(commands: Commands) -> None:
    serve = add_command(
        commands,
        "serve",
        about="run the aggregator",
        examples="""
            fedtt serve
            fedtt serve --data /var/lib/fedtt --host 0.0.0.0 --port 8440
            fedtt serve --data /var/lib/fedtt --host 0.0.0.0 --processes 4
            fedtt serve --data /var/lib/fedtt --behind-proxy --address-rate 2000 --max-connections 40000
        """,
        run=_serve,
    )
    place_arguments(serve)
    _listener_arguments(serve)
    _enrolment_arguments(serve)
    limit_arguments(serve)
    serve.add_argument("--log-json", action="store_true", help="write the log as JSON, an object a line")
    serve.add_argument(
        "--traces",
        action="store_true",
        help="send OpenTelemetry traces (default: where OTEL_EXPORTER_OTLP_ENDPOINT or "
        "OTEL_TRACES_EXPORTER is set)",
    )
    serve.add_argument(
        "--drain-s",
        type=float,
        default=0.0,
        help="seconds to go on serving after SIGTERM while /readyz says no (default %(default)s)",
    )


def ledger_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a server's ledger lies."""
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("fedtt-server"),
        help="directory of the database, blobs and tokens (default %(default)s)",
    )
    parser.add_argument(
        "--database",
        default=os.environ.get("FEDTT_DATABASE"),
        help="where the ledger lies, as postgresql+psycopg://USER@HOST/NAME "
        "(default $FEDTT_DATABASE or SQLite in the data directory)",
    )


def place_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a server's data, keys and certificates lie: the same for serving and for checking."""
    ledger_arguments(parser)
    parser.add_argument(
        "--blobs",
        default=os.environ.get("FEDTT_BLOBS"),
        help="where bundles and versions lie: a directory, or s3://BUCKET/PREFIX "
        "(default $FEDTT_BLOBS or blobs in the data directory)",
    )
    parser.add_argument(
        "--tls-cert",
        type=Path,
        help="certificate chain in PEM, for both listeners (default: no TLS, or a proxy's)",
    )
    parser.add_argument("--tls-key", type=Path, help="its key in PEM, without a password")
    parser.add_argument(
        "--server-key",
        type=Path,
        help="file made by `fedtt key delegate`: devices that trust its release key follow this server",
    )


def _listener_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", default="127.0.0.1", help="address devices connect to (default %(default)s)")
    serve.add_argument("--port", type=_port, default=8440, help="0 picks a free one (default %(default)s)")
    serve.add_argument(
        "--admin-host", default="127.0.0.1", help="address people connect to (default %(default)s)"
    )
    serve.add_argument(
        "--admin-port", type=_port, default=8441, help="0 picks a free one (default %(default)s)"
    )
    serve.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="that share the port and the work, one for each core, on Linux; people's ports follow one "
        "another (default %(default)s)",
    )
    serve.add_argument(
        "--reuse-port",
        action="store_true",
        help="share the devices' port and the ledger with other servers on this machine",
    )
    serve.add_argument(
        "--authority",
        dest="authorities",
        type=_authority,
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="a name of this server, as devices have it in its URL (several times for several): requests "
        "that were signed for another are refused (default: any name)",
    )
    serve.add_argument(
        "--behind-proxy",
        action="store_true",
        help="believe X-Forwarded-For, so that rates are counted by the addresses that a proxy saw",
    )


def _enrolment_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--no-standing-token",
        dest="standing_token",
        action="store_false",
        help="let devices enrol with tokens of `fedtt token create` alone, and take back the one for any "
        "number of devices that enrolment-token in the data directory holds otherwise",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST_PROCESSES):
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give a number from 1 to {_MOST_PROCESSES}")
    return int(text)


def _authority(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a server: give HOST or HOST:PORT, and no URL"
        )
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    from aggregator.app import ServerConfig
    from aggregator.connections import ConnectionLimits
    from aggregator.limits import Rates
    from aggregator.logs import set_up_log
    from aggregator.member import Said
    from aggregator.one_process import Settings, serve
    from aggregator.processes import serve_together

    config = ServerConfig(
        data=args.data,
        host=args.host,
        port=args.port,
        admin_host=args.admin_host,
        admin_port=args.admin_port,
        database=args.database,
        blobs=args.blobs,
        server_key=args.server_key,
        standing_token=args.standing_token,
        authorities=tuple(args.authorities),
        forwarded=args.behind_proxy,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        reuse_port=args.reuse_port,
        rates=Rates(key=args.device_rate, addresses=args.address_rate),
        connections=ConnectionLimits(total=args.max_connections, addresses=args.max_connections_per_range),
        idle_s=args.idle_s,
        body_s=args.body_s,
    )
    settings = Settings(config=config, drain_s=args.drain_s, traces=args.traces, log_json=args.log_json)
    announce = partial(_announce, args.data, as_json=args.json)
    if args.processes == 1:
        serve(settings, lambda listening: announce([Said.of(listening)]))
    else:
        set_up_log(as_json=args.log_json, process=0)
        if not asyncio.run(serve_together(settings, args.processes, announce)):
            return 1  # the log says which and how
    if not args.json:
        print("stopped; everything acknowledged is on disk")
    return 0


def _announce(data: Path, said: list[Said], *, as_json: bool) -> None:
    first, others = said[0], [one.admin_url for one in said[1:]]
    dashboard = reachable(first.admin_url) + "/"
    if as_json:
        print_json(
            {
                "event": "listening",
                "url": first.url,
                "admin_url": first.admin_url,
                "dashboard_url": dashboard,
                "enrolment_token": first.enrolment_token,
                "admin_token_file": str(data / "admin-token"),
                "other_admin_urls": others,
            }
        )
        return
    print(f"devices   {first.url}")
    print(f"people    {first.admin_url}  (token in {data / 'admin-token'})")
    for number, url in enumerate(others, 2):
        print(f"          {url}  (process {number}, with metrics of its own)")
    print(f"dashboard {dashboard}")
    token = first.enrolment_token or "TOKEN"
    print(
        f"enrol     fedtt client run --server {reachable(first.url)} --token {token} --data examples.jsonl",
        flush=True,
    )
    if not first.enrolment_token:
        print("          (`fedtt token create` makes a TOKEN: none stands)", flush=True)


def reachable(url: str) -> str:
    """The address for other machines: this one's name where the server listens on all of its addresses."""
    for everywhere in ("//0.0.0.0:", "//[::]:"):
        url = url.replace(everywhere, f"//{socket.gethostname()}:")
    return url
