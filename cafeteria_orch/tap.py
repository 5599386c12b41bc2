"""``twistd cafeorch``: the only place that wires the rooms together."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from twisted.application.service import IService

from . import __version__
from .common.clock import measure_monotonic_time, wall_time
from .common.extras import how_to_install
from .common.pem import PEMError
from .daemon.descriptors import allow_connections
from .daemon.endpoints import client_endpoints, metrics_endpoint
from .daemon.options import Options, one_line, refusal
from .daemon.service import OrchestratorService
from .daemon.signals import SignalHandlers
from .daemon.systemd import SystemdNotifier
from .edge.admission import Admission
from .edge.agencies import Agencies, AgenciesError
from .edge.tls import ServerTLS
from .observe.log_files import LogFile, LogStream
from .observe.logs import BufferedLogObserver, as_json
from .server.factory import OrchestratorFactory
from .server.timeouts import Timeouts
from .store.asking import Asker
from .store.database import Store, StoreError
from .store.location import shown_location, store_at
from .store.sink import Sink
from .store.totals import Completeness

if TYPE_CHECKING:
    from .observe.http import Monitor

__all__ = ("Options", "makeService")

SWITCH_INTERVAL = 0.0005
"""Seconds that a thread may keep the interpreter lock while another one waits for it.

The store's thread takes the lock several times for each commit, and a busy reactor would keep it
for Python's 5 ms each time. Measured beside 40 clients that flood the server with small messages:
a batch is acknowledged after 7 ms instead of 2 s. Without a flood the throughput is the same.
"""

SERVER_INTERVAL = 10.0
"""Seconds between two questions to the database's server about itself."""


def makeService(options: Options) -> IService:
    """Put the server together, and make sure that it can start.

    A mistake must be found here: a daemonising ``twistd`` has not forked yet, and can still
    report it.

    :raises SystemExit: with one line that names the mistake.
    """
    # The import installs a reactor, and twistd decides which one.
    from twisted.internet import reactor  # noqa: PLC0415

    measure_monotonic_time(reactor)
    sys.setswitchinterval(SWITCH_INTERVAL)
    signals = SignalHandlers(
        reactor, None if options.parent is None else options.parent.get("pidfile")
    )
    signals.catch_hangup()
    has_admission = options["tls-cert"] is not None or options["proxy-protocol"]
    max_connections = allow_connections(options["max-connections"], each=2 if has_admission else 1)
    try:
        factory = OrchestratorFactory(
            reactor,
            max_frame_bytes=options["max-frame-bytes"],
            framing=options["framing"],
            max_connections=max_connections,
            max_connections_per_host=options["max-connections-per-host"],
            max_in_flight_bytes=options["max-in-flight-bytes"],
            timeouts=Timeouts(
                options["idle-timeout"], options["frame-timeout"], options["processing-timeout"]
            ),
            wall_time=wall_time,
            log_level=options["log-level"],
        )
    except ValueError as error:
        raise refusal(str(error)) from error
    store = sink = None
    if options["store"] is not None:
        store = store_at(options["store"], options["node"])
        try:
            store.check()
        except StoreError as error:
            raise refusal(str(error)) from error
        sink = Sink(reactor, store, options["store-patience"])
        sink.register(factory)
    for name in options["processors"]:
        _load_processors(name, factory)
    admission = _admission(reactor, factory, max_connections, options) if has_admission else None
    if admission is not None and admission.tls is not None:
        signals.reload = admission.reload
    endpoints = client_endpoints(reactor, options)
    log_observer = _log_observer(options)
    _rotate_on_signal(reactor, log_observer)
    if log_observer is not None:
        signals.flush_log = log_observer.stop
    return OrchestratorService(
        reactor,
        factory,
        endpoints,
        sink=sink,
        drain_timeout=options["drain-timeout"],
        log_observer=log_observer,
        notifier=SystemdNotifier.from_environment(os.environ),
        monitor=_monitor(reactor, factory, sink, store, options),
        admission=admission,
        signals=signals,
        node=options["node"],
        location=shown_location(options["store"]),
        options=options.describe_changes(),
    )


def _server_tls(options: Options) -> ServerTLS | None:
    if options["tls-cert"] is None:
        return None
    try:
        return ServerTLS(
            wall_time, options["tls-cert"], options["tls-key"], options["tls-client-ca"]
        )
    except PEMError as error:
        raise refusal(str(error)) from error


def _agencies(options: Options) -> Agencies | None:
    if options["agencies"] is None:
        return None
    try:
        return Agencies(options["agencies"])
    except AgenciesError as error:
        raise refusal(str(error)) from error


def _admission(
    reactor: Any,
    factory: OrchestratorFactory,
    max_connections: int,
    options: Options,
) -> Admission:
    for description in options["listen"]:
        if description.startswith(("ssl:", "haproxy:")):
            raise refusal(
                f"--listen {description}: --tls-cert and --proxy-protocol hold for all that is"
                " listened to: leave them out, or name a tcp: endpoint"
            )
    return Admission(
        reactor,
        factory,
        max_pending=max_connections,
        trusted=options["proxy-from"] if options["proxy-protocol"] else None,
        tls=_server_tls(options),
        agencies=_agencies(options),
    )


def _monitor(
    reactor: Any,
    factory: OrchestratorFactory,
    sink: Sink | None,
    store: Store | None,
    options: Options,
) -> Monitor | None:
    description = options["metrics"]
    if description is None:
        return None
    # It imports all of Twisted's HTTP.
    from .observe.http import Monitor  # noqa: PLC0415

    endpoint = metrics_endpoint(reactor, description)
    completeness = server = None
    if store is not None:
        completeness = Completeness(reactor, store.totals, wall_time)
        if store.read_server is not None:
            server = Asker(reactor, store.read_server, SERVER_INTERVAL, wall_time)
    try:
        return Monitor(
            reactor,
            factory,
            endpoint,
            __version__,
            sink=sink,
            completeness=completeness,
            server=server,
            node=options["node"],
        )
    except ImportError as error:
        raise refusal(f"--metrics needs prometheus-client: {how_to_install('metrics')}") from error


def _load_processors(name: str, factory: OrchestratorFactory) -> None:
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise refusal(f"--processors {name}: give it as package.module:function")
    if sys.path[:1] != [str(Path.cwd())]:
        sys.path.insert(0, str(Path.cwd()))
    try:
        register = getattr(importlib.import_module(module_name), function_name)
        register(factory)
    except Exception as error:
        raise refusal(f"--processors {name}: {one_line(error)}") from error


def _log_observer(options: Options) -> BufferedLogObserver | None:
    """Our observer, on the file that twistd would log to; its own where it is told another.

    ``twist``, which has no such options, sets up logging of its own.
    """
    twistd = options.parent
    if twistd is None or "nodaemon" not in twistd or twistd["logger"] or twistd.get("syslog"):
        return None
    foreground = twistd["nodaemon"] or twistd["debug"]
    path = twistd["logfile"] or ("-" if foreground else "twistd.log")
    if path != "-":
        try:
            file: LogStream = LogFile(path, options["log-bytes"], options["log-files"])
        except OSError as error:
            raise refusal(f"--logfile {path}: {error.strerror}") from error
    elif foreground:
        file = LogStream(sys.stdout.fileno())
    else:
        raise refusal("a daemon has no standard output to log to: name a --logfile, or say -n")
    render = options["log-format"]
    if render is as_json:
        # Lines of several nodes meet in one collector.
        render = partial(as_json, node=options["node"])
    return BufferedLogObserver(file, options["log-level"], render)


def _rotate_on_signal(reactor: Any, observer: BufferedLogObserver | None) -> None:
    """SIGUSR1 rotates the log, as with twistd's own observer; it never ends the process."""

    def rotate(_: int, __: FrameType | None) -> None:
        if observer is not None:
            reactor.callFromThread(observer.rotate)

    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, rotate)
